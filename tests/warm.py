"""Imports what a run imports, early or late, in the process that the others are forked from."""

import pkgutil
from importlib import import_module
from types import SimpleNamespace

import ft
from ft.runtime import set_environment

set_environment(SimpleNamespace(deterministic=False))

OTHERS = """
    accelerate docstring_parser jinja2 markupsafe matplotlib.backends.backend_agg
    matplotlib.backends.backend_svg matplotlib.pyplot pyarrow.compute safetensors.torch scipy.optimize
    scipy.sparse scipy.special scipy.stats sklearn.metrics torch.distributed tqdm
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.bert.modeling_bert transformers.optimization
"""
OURS = ["train", "eval", *(module.name for module in pkgutil.walk_packages(ft.__path__, "ft."))]
for name in [*OTHERS.split(), *OURS]:
    import_module(name)
