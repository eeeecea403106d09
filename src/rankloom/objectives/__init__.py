"""Losses over named streams of batches: `fit(model, {"retain": …, "forget": …}, loss=NPO())`."""
