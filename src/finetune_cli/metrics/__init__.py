"""Numbers about answers, in NumPy: scores with intervals, calibration, folds."""
