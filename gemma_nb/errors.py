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


class NonFiniteLogitsError(GemmaNbError, FloatingPointError):
    """The model computed NaN or infinite logits; the message names the position."""
