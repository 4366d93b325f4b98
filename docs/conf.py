"""How the documentation is built: `make docs`."""

import os
import sys
from importlib.resources import files
from pathlib import Path

import pyro_bayes

sys.path.append(str(Path(__file__).parent))  # for the extension `gallery`

project = "pyro_bayes"
author = "The pyro_bayes developers"
copyright = author
version = release = pyro_bayes.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "gallery",
]

nitpicky = True
exclude_patterns = ["_build", "notebooks/README.md"]
default_role = "literal"  # docstrings have code in single backticks

# Other projects' names are links with `INTERSPHINX=1 make docs`, which fetches their inventories
# from a network, and plain names without.
if os.environ.get("INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
        "arviz": ("https://python.arviz.org/projects/base/en/stable", None),
        "xarray": ("https://docs.xarray.dev/en/stable", None),
    }
nitpick_ignore_regex = [(r"py:.*", r"(collections|torch|pyro|matplotlib|arviz|xarray)\..*")]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings have types in words, with shapes
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown with the outputs that they are stored with

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = "pyro_bayes"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Formulas are set in the browser by a file of this site, without a network.
html_static_path.append(str(files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js"))
mathjax_path = "tex-svg.js"
