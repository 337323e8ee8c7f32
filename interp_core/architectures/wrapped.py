"""Vision towers around Llama-like language models, where TransformerLens has no module paths: InternVL, SmolVLM."""

from .family import Family, llama_like

INTERNVL = Family("internvl", paths=llama_like("model.language_model"))
SMOLVLM = Family("smolvlm", paths=llama_like("model.text_model"))
