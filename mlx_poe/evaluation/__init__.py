"""Evaluate all predictors of a model on the same texts, in one pass.

- predictors: what they are, and all their predictions from the stages' activations
- scoring: log-probabilities of continuations, for all predictors together
- on_text: bits per byte, accuracy and agreement on a file
- harness, tasks: lm-eval's requests and tasks; needs the extra `eval`
- answers: a cache of scored answers, to resume from
"""
