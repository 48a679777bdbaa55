"""What annotations call a model and a tokenizer; neither transformers nor PEFT is loaded for it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Model = Any
    """A causal language model of transformers, or a ``peft.PeftModel`` around one."""
    Tokenizer = Any
    """A tokenizer of transformers, a ``PreTrainedTokenizerBase``."""
