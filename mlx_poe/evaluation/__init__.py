"""Every predictor of a model on the same texts, from one pass.

- predictors: which there are, and all their predictions from the stages' activations
- scoring: the log-probabilities of continuations, for all predictors together
- on_text: bits per byte, accuracy and agreement on a file
- harness, tasks: lm-eval's requests and its tasks; needs the extra `eval`
- answers: a cache of what has been scored, to resume from
"""
