"""Training of language models on text, for pretraining and for supervised fine-tuning (SFT).

The package holds the configuration of a run (`config`, `config_io`, `renamed`); its data, from
files to batches of packed sequences (`corpora`, `sources`, `tokenizer`, `chat`, `tokens`, `data`);
what is compiled (`mesh`, `optimizer`, `losses`, `step`, `evaluate`, `program`); and the training
loop with everything that a run keeps on disk (`loop`, `stages`, `loading`, `checkpoint`,
`run_folder`, `cost`, `hardware`, `progress`, `signals`). The package `rl` builds on the same parts.
"""
