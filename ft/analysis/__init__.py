"""Analyses of predictions: intervals, calibration, comparisons and errors; on plain numbers."""
