"""Evaluation: how good samples are, and how near a dynamic model stays to its static one.

`metrics` holds the arithmetic, `extractors` the networks whose features are compared, `inputs` what can be evaluated,
`pairs` the comparison from the same seeds. `evaluate` puts them together; `comparing` sets finished evaluations side by side.
"""
