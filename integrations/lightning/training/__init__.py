"""What a run does beside fitting: optimizers and learning rates, calibration of inits, and an audit of what moves."""
