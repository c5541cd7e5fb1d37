"""Loading and saving of Hugging Face folders: DeepSeek-V3, DeepSeek-V2, Llama, Qwen2 and Qwen3."""

from model.hf.config import check_supported
from model.hf.loading import load
from model.hf.reader import CheckpointError
from model.hf.saving import save
