"""What can go wrong, by name.  Each message says what was expected, what came and what to do."""


class GemmaNbError(Exception):
    """Base of the errors this package raises on purpose."""


class CheckpointError(GemmaNbError):
    """A checkpoint cannot be found, read or trusted."""


class ModelNotInstalledError(CheckpointError):
    """A known model is not on this machine; the message gives the command that installs it."""


class TextError(GemmaNbError, ValueError):
    """Text that cannot be tokenized (for example a lone surrogate)."""


class BusyError(GemmaNbError, RuntimeError):
    """The session is already generating; it takes one message at a time."""


class ContextFullError(GemmaNbError, RuntimeError):
    """There is no room in the context for what was asked; the message says how much is needed."""


class NonFiniteLogitsError(GemmaNbError, FloatingPointError):
    """The model computed NaN or infinite logits; the message names the position."""


class ConversationError(GemmaNbError):
    """A saved conversation cannot be found, read, trusted or written."""


class ModelMismatchError(ConversationError):
    """A saved conversation was held with another model, or with another tokenizer."""


class InterventionWarning(UserWarning):
    """An intervention that acts nowhere, or not everywhere that it names, in the text at hand."""


class ConversationWarning(UserWarning):
    """Something about a saved conversation that its owner should know; nothing was lost by it."""
