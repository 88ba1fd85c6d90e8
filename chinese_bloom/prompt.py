"""The prompt of models that have none: BLOOM and Falcon were never trained to chat."""

from model import PLAIN_TEMPLATE

# The headings of Alpaca (Taori et al., 2023), which BLOOM's and Falcon's Chinese descendants were tuned with. Each
# answer ends in EOS, several turns follow one another, and nothing stands between "### Response:" and the answer.
ALPACA = """{% for message in messages %}{% if message.role == 'user' %}### Instruction:
{{ message.content }}

### Response:{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}

{% elif message.role == 'system' %}{{ message.content }}

{% else %}{{ raise_exception('there is no place for a ' + message.role + ' message in it') }}{% endif %}{% endfor %}"""


def use_alpaca(tokenizer) -> None:
    """Gives a tokenizer that brought no template of its own Alpaca's, in the place of the plain one."""
    if tokenizer.chat_template.endswith(PLAIN_TEMPLATE):
        tokenizer.chat_template = tokenizer.chat_template.removesuffix(PLAIN_TEMPLATE) + ALPACA
