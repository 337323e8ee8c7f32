"""One of each: a package that brings a method, a recipe, an engine, a family and a launcher."""
