"""Studies of DeepSeek-V3 (arXiv:2412.19437) and of the papers that it builds on."""
