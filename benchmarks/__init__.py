"""What the exact penalty costs, measured: `python -m benchmarks`.

harness.py          a subject, the check before the clock, a row
methods.py          jaxcae's training steps as subjects
torch_methods.py    PyTorch's, from parity's reference model
steps.py … prediction.py   the suites, one question each
roofline.py         steps on 1 to 1,024 devices, predicted; roofline_check.py compares with XLA
targets.py          the figures to reach, with what was measured
report.py, pictures.py     what a person reads
"""
