"""Tokenizers of chat models, whose prompts are in the ChatML format."""

from train.tokenizer import Tokenizer

STOP = "<|im_end|>"


class ChatTokenizer(Tokenizer):
  """A tokenizer that encodes ChatML markers as special tokens, and whose eos ends a turn.

  A plain `Tokenizer` encodes text that spells a special token as ordinary text. This one encodes it
  as the special token, so use it only for prompts that the program itself has composed, never for
  untrusted text.

  Attributes:
    eos: id of `<|im_end|>`, which ends a turn. The eos of a plain `Tokenizer` ends a document.
  """

  def __init__(self, definition: str):
    """Builds the tokenizer from the text of a `tokenizer.json`, as `Tokenizer` does.

    Raises:
      ValueError: as `Tokenizer` raises it, and if the vocabulary has no `<|im_end|>`.
    """
    super().__init__(definition)
    self._tokenizer.encode_special_tokens = False
    self.eos = self._tokenizer.token_to_id(STOP)
    if self.eos is None:
      raise ValueError(f"this tokenizer has no {STOP}: use a model fine-tuned on ChatML")
