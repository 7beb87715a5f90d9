"""Reading and resampling audio, the log-mel front-end, augmentation."""
