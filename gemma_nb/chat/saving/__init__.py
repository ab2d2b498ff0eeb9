"""Saving: a conversation as a file: every branch, the evidence of every token, and the settings.

The file is a zip whose members are stored without compression, so any tool can open it:

    conversation.json          the structure: settings, texts, branches
    evidence/<id>.safetensors  the evidence of the turn with this id, where it has any

conversation.json, format version 1, is one object:

    format, version    "gemma_nb conversation", 1
    written_by         "gemma_nb 0.1.0"
    conversation       32 hexadecimal digits, drawn once: the same in every copy of a conversation
    generation         32 hexadecimal digits, drawn anew each time that the file is written
    previous           the generation that stood here before; null where there was none
    identity           the model and tokenizer of the evidence: name, title, config, weights,
                       tokenizer (see `gemma_nb.chat.saving.fingerprint.Fingerprint`)
    settings           system, sampling, template, capture, cache_length, ...: the arguments of
                       `ChatSession`.  A template is {"name", "fields"}, or {"name", "own"} with
                       the class of one that is not this package's
    nodes              id -> {"children": [ids], "active": index or null, ...}.  "0" is the root;
                       any other node has the id of its turn.  Children are in the order in which
                       they were made; the active one is shown.  Other fields as of
                       `gemma_nb.chat.node.Node`
    turns              id -> the fields of `gemma_nb.chat.turns.Turn`.  A field with evidence is
                       {"rows": n} and its rows are in the turn's safetensors file
    under              id -> the interventions that a reply was computed under, where these are not
                       the model's own; `gemma_nb.chat.saving.interventions` says how
    strings            texts of tokens, to which the evidence refers by index, and others that are
                       stored once, to which this file refers by {"string": index}
    lists              long lists of integers, to which this file refers by {"list": index}

A reply's safetensors file has one array per column: `tokens.token_id`, `tokens.logprob`,
`tokens.entropy`, `tokens.rank`, `tokens.position`, `tokens.alternatives.count`, and so on, by the
fields of `TokenRecord` and `Alternative`; `gemma_nb.chat.saving.columns` says how.  Integers are
in the smallest dtype that holds them; floats in float32, as they were computed, or in float64 where
that would change one.

While a conversation is saved as it goes on, what happened since the file was written stands in the
journal beside it, `<file>.journal` (see `gemma_nb.chat.saving.journal`), whose header names the
generation that it continues.  The JSON of a record has what changed in conversation.json: new or
changed `nodes`, `turns` and `under`, all `settings`, what `strings` and `lists` have more; its
blobs are the turns' safetensors.  The reply being made is `partial`, {"parent", "start", "turn"},
and the blob "partial" has its tokens from `start` on.  Loading reads both files.  When the journal
has grown, it is folded into the file, which is replaced as a whole.

A program reads versions up to its own; a new version is given when an older program could no longer
read a file rightly.  Nothing is pickled, no name from the file is ever imported or opened.
"""
