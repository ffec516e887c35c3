"""The runtime as a local service: OpenAI's HTTP API over one `Engine`, and a page that shows the
depth of every token.

- errors: error responses in OpenAI's format; wire: JSON and server-sent events as bytes
- fields: a request's JSON, read field by field; options: the fields that both endpoints share
- chat, completions: one endpoint each; messages: a chat's history; answer: what both reply with
- choice, logprobs: from the engine's responses to pieces of text and their log-probabilities
- serving: running a request's sequences, streaming, clients that disconnect or are slow
- catalog: the models served, by name
- guard: access control; metrics: figures for Prometheus; app: the routes
"""
