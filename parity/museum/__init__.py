"""The museum of wrong penalties: each recipe measured against the truth, and trained with."""
