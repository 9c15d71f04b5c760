"""What a run imports, for the process of which the others are forks."""

from types import SimpleNamespace

from ft.runtime import set_environment

set_environment(SimpleNamespace(deterministic=False))

import accelerate  # noqa: E402, F401
import jinja2  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import torch.distributed  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import eval  # noqa: E402, F401
import train  # noqa: E402, F401
