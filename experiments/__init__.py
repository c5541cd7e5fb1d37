"""What is run: one file per experiment, one command for all of them."""
