"""Attribution: what the tokens of a prompt count for in what a model says.

Methods of one interface (`method`), their evaluation (`faithfulness`, `recovery`), cached datasets (`cache`), and the
files of published runs (`traces`, `exports`).
"""
