"""One model on several machines, over `mx.distributed`: rank 0 decodes, the others own stages.

- `messages`: the format of a message, and its route to a rank
- `link`: rank 0's end, in its own thread, with a time limit for every answer
- `remote`: a stage on another machine, as rank 0's state and driver see it
- `owner`: the other end, a loop that carries out messages
- `placement`: which rank holds which part of the model
"""
