"""From a config to a finished run: assembling, compiling, training, evaluating, saving, reporting."""
