"""Alarms that can be defended: scores of series, calibration, events, measures, baselines."""
