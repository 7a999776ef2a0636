"""The commands and the schema of each one's TOML file; of a command with several words, each has one."""

from __future__ import annotations

from pydantic import BaseModel

from config.add_tokens import AddTokensConfig
from config.adopt import AdoptConfig
from config.bench_infer import BenchInferConfig
from config.bench_serve import BenchServeConfig
from config.bench_tokenizer import BenchTokenizerConfig
from config.bench_train import BenchTrainConfig
from config.chat import ChatCommandConfig
from config.download import DownloadConfig
from config.eval import EvalConfig
from config.export import ExportConfig
from config.fit import FitConfig
from config.import_ import ImportConfig
from config.infer import InferConfig
from config.init import InitConfig
from config.make_data import MakeDataConfig
from config.plan import PlanConfig
from config.quickstart import QuickstartConfig
from config.runs_compare import RunsCompareConfig
from config.runs_list import RunsListConfig
from config.runs_report import RunsReportConfig
from config.runs_show import RunsShowConfig
from config.runs_tail import RunsTailConfig
from config.runs_verify import RunsVerifyConfig
from config.scaling import ScalingConfig
from config.serve import ServeConfig
from config.sweep import SweepConfig
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig

COMMANDS: dict[str, type[BaseModel]] = {
    "transformerlm-quickstart": QuickstartConfig,
    "transformerlm-init": InitConfig,
    "transformerlm-download": DownloadConfig,
    "transformerlm-train-tokenizer": TrainTokenizerConfig,
    "transformerlm-make-data": MakeDataConfig,
    "transformerlm-adopt": AdoptConfig,
    "transformerlm-add-tokens": AddTokensConfig,
    "transformerlm-train": TrainConfig,
    "transformerlm-plan": PlanConfig,
    "transformerlm-sweep": SweepConfig,
    "transformerlm-scaling": ScalingConfig,
    "transformerlm-fit": FitConfig,
    "transformerlm-runs list": RunsListConfig,
    "transformerlm-runs report": RunsReportConfig,
    "transformerlm-runs show": RunsShowConfig,
    "transformerlm-runs tail": RunsTailConfig,
    "transformerlm-runs compare": RunsCompareConfig,
    "transformerlm-runs verify": RunsVerifyConfig,
    "transformerlm-infer": InferConfig,
    "transformerlm-chat": ChatCommandConfig,
    "transformerlm-serve": ServeConfig,
    "transformerlm-eval": EvalConfig,
    "transformerlm-export": ExportConfig,
    "transformerlm-import": ImportConfig,
    "python -m benchmarking.bench_tokenizer": BenchTokenizerConfig,
    "python -m benchmarking.bench_train": BenchTrainConfig,
    "python -m benchmarking.bench_infer_latency": BenchInferConfig,
    "python -m benchmarking.bench_serve": BenchServeConfig,
}
SUMMARIES = {"transformerlm-runs": "List your training runs, those that train now too, and look into them"}
"""What a command does that has several words, each with a schema of its own."""
