"""Loading and saving of Hugging Face folders: DeepSeek-V3, DeepSeek-V2, Llama and Qwen2."""

from model.hf.config import CheckpointError, check_supported
from model.hf.loading import load
from model.hf.saving import save
