"""Tokenizers of models that are tuned to talk in turns."""

from train.tokenizer import Tokenizer

STOP = "<|im_end|>"


class ChatTokenizer(Tokenizer):
  """Reads ChatML's marks in a prompt as the tokens that they are, and ends with a turn.

  Text that spells a mark becomes that mark: for prompts that a program has composed, not for text
  of strangers.

  Attributes:
    eos: ends a turn, where a `Tokenizer`'s ends a document.
  """

  def __init__(self, definition: str):
    """As `Tokenizer`'s.

    Raises:
      ValueError: also if the vocabulary has no token that ends a turn.
    """
    super().__init__(definition)
    self._tokenizer.encode_special_tokens = False
    self.eos = self._tokenizer.token_to_id(STOP)
    if self.eos is None:
      raise ValueError(f"this tokenizer has no {STOP}: give a model that is tuned on ChatML")
