"""What users run: the command line, programs, studies, benchmarks and their reports.

Imports within this package go one way, too. `settings`, `options`, `stats` and `catalogue` import
nothing else from it; `reports` draws the data that it is given; `studies` compares training runs;
`programs` and `benchmarks` may use all of these, but not each other; `run` is the command line,
which finds the experiments by folder.
"""
