"""Studies of DeepSeek-R1 (arXiv:2501.12948) and of the papers that it builds on."""
