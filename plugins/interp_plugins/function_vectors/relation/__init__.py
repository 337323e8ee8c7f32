"""Function vectors of a relation's questions: a table of pairs in; heads, a vector and its layer out, for each."""
