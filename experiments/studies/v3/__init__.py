"""Studies of DeepSeek-V3 (arXiv:2412.19437) and of what it builds on."""
