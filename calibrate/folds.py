"""The folds that samples fall into, by the hash of their tokens.

The last fold is held out: scales are chosen on the others and checked on it. Adding the folds one by one gives the
convergence curve.
"""

NUM_FOLDS = 8
HELD_OUT_FOLD = NUM_FOLDS - 1
CALIBRATION_FOLDS = tuple(range(HELD_OUT_FOLD))
