"""The fields of `data`: sources, contexts, tokenizer, prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.group import Group

Split = Literal["train", "validation", "test"]
CHAT = (
    "put prompts into the tokenizer's chat template; default: where it has one, LongBench's few-shot tasks "
    "excepted, as LongBench's own code does"
)


class Source(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name in tables and file names")
    use: tuple[Split, ...] = Field(
        ("train", "validation", "test"), min_length=1, description="splits that it feeds"
    )


class DrawnSource(Source):
    """Its splits are drawn by document, with these fractions."""

    validation_fraction: float = Field(0.05, ge=0, lt=1, description="share of documents")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="share of documents")

    @model_validator(mode="after")
    def _fractions_leave_training(self) -> DrawnSource:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must stay below 1")
        return self


class TextSource(DrawnSource):
    """Any text files, to be continued; or, with `ask`, to be asked about."""

    kind: Literal["text"]
    files: tuple[str, ...] = Field(
        min_length=1,
        description='paths or globs; of JSON lines and parquet the field "text" of each row is a document; '
        '"stdlib" is the sources of the running Python\'s standard library',
    )
    ask: str | None = Field(
        None,
        exclude_if=lambda ask: ask is None,  # as if it had not been added: fingerprints stay; so below
        description="what is asked of each document, with {text} where the text stands; training is then on "
        "the target's own answers",
    )
    training_prompts: dict[int, Annotated[int, Field(ge=1)]] = Field(
        default={},
        exclude_if=lambda prompts: not prompts,
        description="with ask: tokens of a training prompt → most prompts of that length; default: what "
        "sequence_tokens leaves before the windows, and no limit",
    )
    chat_template: bool | None = Field(None, exclude_if=lambda chat: chat is None, description=CHAT)

    @model_validator(mode="after")
    def _asks(self) -> TextSource:
        if self.ask is None and (self.training_prompts or self.chat_template is not None):
            raise ValueError("training_prompts and chat_template go with ask")
        return self


class ConversationsSource(DrawnSource):
    """Conversations, a row each; training is on the target's own answer in place of the last one."""

    kind: Literal["conversations"]
    files: tuple[str, ...] = Field(
        min_length=1,
        description="paths or globs of .jsonl, .jsonl.gz or .json (a list): rows with `messages` (`role`, "
        "`content`) or `conversations` (`from`, `value`)",
    )


class Pg19Source(Source):
    """PG-19: whole books, with the splits of the hub's data set."""

    kind: Literal["pg19"]
    path: str = Field("emozilla/pg19", description="hub id, or a folder with train/validation/test files")


class LongBenchSource(Source):
    """One LongBench task: a templated prompt over a long context. Feeds the test split only."""

    kind: Literal["longbench"]
    task: Literal[
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report",
        "qmsum", "multi_news", "trec", "triviaqa", "samsum", "passage_retrieval_en",
    ]  # fmt: skip
    use: tuple[Literal["test"], ...] = ("test",)
    path: str = Field("THUDM/LongBench", description="hub id, a folder of <task>.jsonl[.gz], or its data.zip")
    prompts_file: str | None = Field(None, description="LongBench's own dataset2prompt.json")
    max_lengths_file: str | None = Field(None, description="LongBench's own dataset2maxlen.json")
    truncation: Literal["middle", "paper"] = Field(
        "middle", description="middle: LongBench's, the template kept; paper: the first tokens of the prompt"
    )
    chat_template: bool | None = Field(None, exclude_if=lambda chat: chat is None, description=CHAT)


class LwmSource(Source):
    """LWM's tasks: a NarrativeQA summary prompt, or needles hidden in book text."""

    kind: Literal["lwm"]
    use: tuple[Split, ...] = Field(("test",), min_length=1, description="splits that it feeds")
    task: Literal["summary", "needle", "multi_needle"] = "summary"
    path: str = Field(
        "deepmind/narrativeqa",
        description="hub id, or a folder with train/validation/test files (or one file) in NarrativeQA's or "
        "PG-19's schema",
    )
    prompt_split: Split | None = Field(
        None,
        description="split of the data set that the test prompts come from; default: train for summary (as "
        "in the paper), test for the needles",
    )
    rows: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="rows of prompt_split that become prompts; default: the paper's 20 for summary, all for "
        "the needles; []: all",
    )
    template: str | None = Field(None, description="wording; {book} (summary) or {context} and {question}")
    needles: int = Field(3, ge=2, le=20, description="needles in one multi_needle prompt")
    chat_template: bool | None = Field(None, exclude_if=lambda chat: chat is None, description=CHAT)


class PromptsSource(Source):
    """The user's own prompts: rows with `prompt` or `messages`, or one text file a prompt. Test only."""

    kind: Literal["prompts"]
    use: tuple[Literal["test"], ...] = ("test",)
    files: tuple[str, ...] = Field(
        min_length=1, description="paths or globs of .jsonl, .jsonl.gz, .json (a list) or text files"
    )
    chat_template: bool = Field(False, description="wrap each prompt in the tokenizer's chat template")


AnySource = Annotated[
    TextSource | Pg19Source | LongBenchSource | LwmSource | PromptsSource | ConversationsSource,
    Field(discriminator="kind"),
]


def answered(source: Source) -> bool:
    """Whether training on a source is on the target's answers, not on the text itself."""
    return isinstance(source, ConversationsSource) or (
        isinstance(source, TextSource) and source.ask is not None
    )


class Context(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="name in tables, such as 4K")
    tokens: int = Field(ge=16, description="exact prompt length, in tokens")


class Tokenizer(Group):
    kind: Literal["target", "bpe"] = Field("target", description="the target's own, or a new byte-level BPE")
    vocab_size: int = Field(512, ge=264, le=200_000, description="entries of a new BPE, specials included")


class Data(Group):
    root: str = Field(".", description="folder that relative source paths start from")
    prepared: str | None = Field(
        None,
        description="folder of a finished stage prepare of these settings, made elsewhere, in place of "
        "reading the sources",
    )
    sources: tuple[AnySource, ...] = Field(min_length=1)
    tokenizer: Tokenizer = Tokenizer()
    sequence_tokens: int = Field(ge=32, description="tokens of one training sequence, prefix + continuation")
    max_sequences: int = Field(1_000_000_000, ge=1, description="most training sequences kept")
    contexts: tuple[Context, ...] = Field(min_length=1, description="prompt lengths that are evaluated")
    max_new_tokens: int = Field(256, ge=2, description="tokens of one continuation, the first included")
    prompts: int = Field(10, ge=1, description="test prompts per data set and context")
    validation_prompts: int = Field(8, ge=0, description="prompts of the validation curve, first context")
    prompts_per_document: int = Field(4, ge=1, description="most non-overlapping prompts from one document")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="bad rows beyond this share fail the stage")
    documents_per_shard: int = Field(64, ge=1, description="documents that one task reads and packs")

    @property
    def context_tokens(self) -> dict[str, int]:
        """Prompt lengths by the names of the contexts."""
        return {context.name: context.tokens for context in self.contexts}

    @property
    def asks(self) -> bool:
        """Whether some of the training is on the target's own answers."""
        return any(answered(source) and "train" in source.use for source in self.sources)

    @model_validator(mode="after")
    def _prepared_has_a_tokenizer(self) -> Data:
        if self.prepared is not None and self.tokenizer.kind == "target":
            raise ValueError(
                "prepared needs tokenizer.kind: bpe, which lies beside the data; where the tokenizer is the "
                "target's own, give the sources"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Data:
        for what, names in (
            ("sources", [s.name for s in self.sources]),
            ("contexts", [c.name for c in self.contexts]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what}: the name {sorted(twice)[0]!r} is used twice")
        return self
