"""The exact engine: squared Frobenius norms of encoder Jacobians, and estimators of them."""
