"""What can be said of predictions: intervals, calibration, comparisons and errors; on numbers alone."""
