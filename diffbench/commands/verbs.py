"""The verbs of `diffbench --help`: what each does, where its keys are declared, and two examples."""

from dataclasses import dataclass, field

from diffbench.config.keys import IN_TRAINING, Key, read_keys

RUN = "config/kinds.py:RunConfig"
SAMPLE, EVALUATE = "config/sections.py:SampleConfig", "config/sections.py:EvaluateConfig"


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        text: what it does, in one line.
        examples: two lists of arguments to put after `diffbench VERB`.
        keys: dataclass of its keys -> prefix of their names; see `config.keys.read_keys`.
        more: further keys, and notes about the keys.
        module: its module in commands/, if the name differs.
        json: whether it takes --json.
        unused: names of keys that it does not use, and does not show.
    """

    text: str
    examples: tuple[str, str]
    keys: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    module: str = ""
    json: bool = False
    unused: tuple[str, ...] = ()

    def read_keys(self) -> list[Key]:
        """Read its keys from the source of their dataclasses."""
        keys = [key for place, prefix in self.keys.items() for key in read_keys(place, prefix)]
        return [key for key in keys if key.name not in self.unused]


_KINDS = "For the keys of a classifier or an autoencoder see `diffbench show CONFIG`."
_SLURM = "launcher=slurm submits the command to SLURM; launcher.KEY=VALUE sets an option of the job."
_IN_TRAINING = tuple(f"evaluate.{key}" for key in IN_TRAINING)
_THE_RUNS = "Keys that are left out keep their values from the run's config."
VERBS = {
    "init": Verb("copy the shipped experiments into a folder, as a starting point", ("", "my-project")),
    "train": Verb(
        "train an experiment; run the same command again to resume it",
        ("experiments/digits/dit.yaml", "experiments/digits/diffit.yaml seed=1 optimizer.lr=1e-3"),
        {RUN: ""},
        (
            "restart=true renames the run's existing folder and starts over.",
            "evaluate=null skips the scoring at the end.",
            _KINDS,
            _SLURM,
        ),
    ),
    "encode": Verb(
        "encode an experiment's data into latents ahead of training",
        ("experiments/digits-latent/dit.yaml", "experiments/digits-latent/dit.yaml latent_dtype=float32"),
        {RUN: ""},
        (_SLURM,),
    ),
    "show": Verb(
        "print an experiment's resolved config and the origin of each value, without training",
        ("experiments/digits/dit.yaml", "experiments/digits/dit.yaml denoiser.depth=2"),
        {RUN: ""},
        (_KINDS,),
    ),
    "list": Verb(
        "list backbones, presets and experiments, or the runs in folders",
        ("", "runs --json"),
        json=True,
    ),
    "evaluate": Verb(
        "score samples from a run, or any images",
        ("runs/digits/dit-s0 sample.steps=50", "samples.npz --against runs/digits/dit-s0"),
        {EVALUATE: "evaluate.", SAMPLE: "sample."},
        (
            "seed=0 sets the seed of the samples, ema=0.999 selects the average with that decay, snapshot=best selects"
            " the weights with the lowest distance during training, and export=FILE.npz saves the samples.",
            "With --against, only evaluate.extractor, weights, reference and infinity are allowed.",
            _THE_RUNS,
        ),
        json=True,
        unused=_IN_TRAINING,
    ),
    "reference": Verb(
        "compute statistics of real images, for evaluate --against",
        ("runs/digits/dit-s0 evaluate.count=1000", "pets/ evaluate.extractor=random-cnn out=stats.safetensors"),
        {EVALUATE: "evaluate."},
        (
            "out=FILE.safetensors, or FILE.npz for the ADM evaluator, also saves the statistics to that file.",
            "Images that are not a run's need evaluate.extractor; evaluate.count and evaluate.reference are for runs.",
        ),
        unused=(*_IN_TRAINING, "evaluate.judge", "evaluate.infinity"),
    ),
    "sample": Verb(
        "draw samples from a run into an image file",
        ("runs/digits/dit-s0 labels=3 n=16 guidance=2", "runs/digits/dit-s0 out=digits.png strip=true gif=true"),
        {"commands/sample.py:DrawConfig": "", SAMPLE: ""},
        (_THE_RUNS,),
    ),
    "study": Verb(
        "train every variant of a study with every seed, and write its report",
        ("experiments/studies/backbones.yaml", "experiments/studies/window.yaml --dry-run seeds=[0,1] jobs=2"),
        {"studies/config.py:StudyConfig": ""},
        ("--dry-run only prints the plan.", _SLURM),
    ),
    "compare": Verb(
        "compare several runs, or the variants of a study, in a table and a report",
        ("runs/digits/dit-s0 runs/digits/unet-s0", "runs/studies/backbones primary=fd export=table.tex"),
        {"commands/compare.py:CompareConfig": ""},
        json=True,
    ),
    "reproduce": Verb(
        "retrain cells of a report from its page alone, and compare every value",
        ("runs/studies/backbones/report.html", "report.html dit/0 out=again"),
        {"commands/reproduce.py:ReproduceConfig": ""},
        (
            "A cell is a variant and a seed, e.g. dit/0; dit alone means all its seeds, and all means every cell."
            " Without a CELL, all cells are listed with the time each takes. The exit code is 1 if anything differs.",
        ),
    ),
    "findings": Verb(
        "check published claims against the shipped results, or against studies run here",
        ("", "run=true seeds=[0,1,2,3,4]"),
        {"commands/findings.py:FindingsConfig": ""},
        ("With run=true, the keys of a study are allowed too, e.g. seeds=[0,1,2].",),
    ),
    "curves": Verb(
        "write an experiment's reference curves from runs that differ only in their seed",
        ("runs/digits/dit-s0 runs/digits/dit-s1 runs/digits/dit-s2", "runs/digits/dit-s? out=curves.csv"),
        {"commands/curves.py:CurvesConfig": ""},
    ),
    "attention": Verb(
        "plot what a run's tokens attend to during sampling",
        ("runs/digits/diffit-s0", "runs/digits/diffit-s0 times=6 layers=[blocks.0]"),
        {"reports/attention.py:AttentionConfig": ""},
    ),
    "explain": Verb(
        "show which other classes a class is made of",
        ("runs/digits/dit-s0 class=8", "runs/digits/dit-s0 class=8 n=2 target=noise out=eight.png"),
        {"evaluation/explain.py:ExplainConfig": ""},
        (
            "class=8 sets the class, by name or number; it is required.",
            f"sample.KEY=VALUE changes how its samples are drawn, by default without guidance. {_THE_RUNS}",
        ),
    ),
    "import": Verb(
        "turn a published checkpoint into a run folder",
        ("dit DiT-XL-2-256x256.pt runs/imported/dit-xl-2", "adm model.pt runs/imported/adm arguments.num_heads=16"),
        more=(
            "arguments.NAME=VALUE passes an argument to the reference's constructor, for a size that is not published;"
            " weights=KEY takes that set of weights instead of the average; ignore=[NAME] skips weights; any other key"
            " is set in the config, e.g. sample.steps=50.",
        ),
        module="import_checkpoint",
    ),
    "completion": Verb(
        "print a bash script that completes commands, keys and files (zsh: run bashcompinit first)",
        ("> ~/.diffbench-completion.sh", "| grep trainer"),
    ),
}
