"""What users run: the command, programs, studies, benchmarks and their reports.

Imports go one way inside, too: `settings`, `options` and `stats` know nothing above them; `reports`
draw what they are given; `studies` compare training runs; `programs` and `benchmarks` use all of
these and not each other; `run` is the command, and finds the rest by folder.
"""
