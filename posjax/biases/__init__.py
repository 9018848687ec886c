"""Biases: additions to the logits, described instead of built; see `posjax.biases.base`.

| file       | descriptions                                                                        |
|------------|-------------------------------------------------------------------------------------|
| base       | what a description is; an array                                                     |
| relative   | a function of two positions                                                         |
| sum        | a sum of descriptions                                                               |
| contextual | Contextual Position Encoding: a count of gates                                      |
| running    | forget gates and stick-breaking: other sums along the keys                          |
| tables     | trained vectors and factors of the relative position, for keys, queries and values  |
| products   | a vector of each query times a vector of each key                                   |
| grouped    | other queries and keys beyond a window                                              |
| scaled     | a description times a number                                                        |
"""
