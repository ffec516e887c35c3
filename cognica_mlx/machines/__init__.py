"""One model on several machines, over `mx.distributed`: rank 0 decodes, the others own stages.

- `messages`: what a message is made of, and how it gets to a rank
- `link`: rank 0's end, in a thread of its own, with a time limit for every answer
- `remote`: a stage on another machine, as rank 0's state and driver see it
- `owner`: the other end, a loop that carries out what it is told
- `split`: which rank holds what
"""
