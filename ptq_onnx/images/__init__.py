"""Images for calibration and validation: folders, arrays, iterables, preprocessing, labels."""
