"""Chat templates in the manner of well-known models, for seedling's tokenizer."""

from functools import cache

from transformers import AutoTokenizer

from runtime.models import SEEDLING, find_model
from runtime.text import Text

_TURNS = """
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content -}}
{%- for call in message.tool_calls or [] -%}
%CALL%
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_TOOLS = """
{%- if tools -%}
{{- '<|im_start|>system\\n%WORDS%\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
"""

PLAIN = _TURNS.replace("%CALL%", "")
# As Qwen's and Hermes' models write calls down.
HERMES = _TOOLS.replace(
    "%WORDS%", 'Call a tool by <tool_call>{"name": ..., "arguments": ...}</tool_call>.'
) + _TURNS.replace(
    "%CALL%",
    """
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
""",
)
# As Llama 3.1 does: one call a turn and nothing around it.
LLAMA = _TOOLS.replace("%WORDS%", "Tools:") + _TURNS.replace(
    "%CALL%",
    """
{%- if not loop.last -%}{{- raise_exception('one call a turn') -}}{%- endif -%}
{{- '{"name": "' ~ call.function.name ~ '", "parameters": ' ~ (call.function.arguments | tojson) ~ '}' -}}
""",
)

# As Qwen 3 does: reasoning between tags, calls and results of tools between others, results that follow each other in one turn.
_QWEN_TOOLS = """
{%- macro tool_lines() -%}
{{- '# Tools\\n\\nCall them by <tool_call>{"name": ..., "arguments": ...}</tool_call>.\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
{{- '</tools>' -}}
{%- endmacro -%}
"""
_QWEN_HEAD = """
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content ~ '\\n\\n' -}}{%- endif -%}
{{- tool_lines() ~ '<|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' -}}
{%- endif -%}
"""
_QWEN_TURNS = """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if message.reasoning_content and %KEPT% -%}
{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif not loop.first or message.role != 'system' or %SAYS_SYSTEM% -%}
{%- if %TOOLS_HERE% and loop.index0 == ns.last -%}{{- '<|im_start|>system\\n' ~ tool_lines() ~ '<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _qwen(head: str, kept: str = "true", says_system: str = "false", tools_here: str = "false") -> str:
    turns = (
        _QWEN_TURNS.replace("%KEPT%", kept).replace("%SAYS_SYSTEM%", says_system).replace("%TOOLS_HERE%", tools_here)
    )
    return _QWEN_TOOLS + head + turns


QWEN = _qwen(_QWEN_HEAD)
# What was thought before the last question is dropped, as Qwen 3's own template does.
QWEN_FORGETFUL = _qwen(_QWEN_HEAD, kept="loop.index0 > ns.last")
# Tools stand before the last question, as in Mistral's templates.
QWEN_LATE_TOOLS = _qwen("", says_system="true", tools_here="tools")
_CALLS = """
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
"""
# As Qwen3 does: it thinks unless told not to, shows of earlier turns what was said alone, and has outputs share a user's turn.
QWEN3 = _TOOLS.replace("%WORDS%", "# Tools") + (
    """
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > last.user and (loop.last or message.reasoning_content) -%}
{{- '<think>\\n' ~ (message.reasoning_content or '').strip('\\n') ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content or '' -}}
"""
    + _CALLS
    + """
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
)
# As Llama 3.1 does: a system's turn always, the tools within the first user's, contents without blanks around them.
LLAMA3 = """
{%- set said = messages -%}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content.strip() -%}{%- set said = messages[1:] -%}
{%- endif -%}
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nToday.\\n\\n' ~ system ~ '<|eot_id|>' -}}
{%- if tools -%}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n\\n' -}}{%- endfor -%}
{{- said[0].content.strip() ~ '<|eot_id|>' -}}
{%- set said = said[1:] -%}
{%- endif -%}
{%- for message in said -%}
{%- if message.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ message.content ~ '<|eot_id|>' -}}
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}{{- raise_exception('one call a turn') -}}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ call.name ~ '", "parameters": ' -}}
{{- call.arguments | tojson ~ '}<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content.strip() ~ '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
# As Mistral 7B v0.3 does: turns alternate, and the system's words and the tools stand at the last of the user's.
MISTRAL = """
{%- set said = messages -%}
{%- set system = none -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set said = messages[1:] -%}
{%- endif -%}
{%- set turns = namespace(count=0) -%}
{%- for message in said -%}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) -%}
{%- if (message.role == 'user') != (turns.count % 2 == 0) -%}{{- raise_exception('turns must alternate') -}}{%- endif -%}
{%- set turns.count = turns.count + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- set users = said | selectattr('role', 'equalto', 'user') | list -%}
{{- '<s>' -}}
{%- for message in said -%}
{%- if message.role == 'user' -%}
{%- if tools and message == users[-1] -%}{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST] ' -}}
{%- if loop.last and system is not none -%}{{- system ~ '\\n\\n' -}}{%- endif -%}
{{- message.content ~ '[/INST]' -}}
{%- elif message.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in message.tool_calls -%}
{{- call.function | tojson -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']</s>' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' ~ message.content.strip() ~ '</s>' -}}
{%- elif message.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' ~ message.content ~ '}[/TOOL_RESULTS]' -}}
{%- else -%}
{{- raise_exception('only user, assistant and tool are roles here') -}}
{%- endif -%}
{%- endfor -%}
"""
# As Gemma 2 does: no system, turns alternate, contents without blanks around them.
GEMMA = """
{{- '<bos>' -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' ~ role ~ '\\n' ~ (message.content | trim) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
# As DeepSeek's R1 distillates do: the arguments of calls are joined as text, and the model begins within its reasoning.
DEEPSEEK = """
{%- set ns = namespace(system='', is_output=false) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = message.content -%}{%- endif -%}
{%- endfor -%}
{{- '<bos>' + ns.system -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns.is_output = false -%}{{- '<|User|>' + message.content -}}
{%- elif message.role == 'assistant' and message.content is none -%}
{%- set ns.is_output = false -%}
{%- for call in message.tool_calls -%}
{{- '<|Assistant|>' if loop.first else '\\n' -}}
{{- '<|call|>function<|sep|>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```<|end_call|>' -}}
{%- endfor -%}
{{- '<|end_of_sentence|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|outputs_end|>' if ns.is_output else '<|Assistant|>' -}}
{{- message.content.split('</think>')[-1] + '<|end_of_sentence|>' -}}
{%- set ns.is_output = false -%}
{%- elif message.role == 'tool' -%}
{{- '\\n' if ns.is_output else '<|outputs|>' -}}{{- '<|output|>' + message.content + '<|end_output|>' -}}
{%- set ns.is_output = true -%}
{%- endif -%}
{%- endfor -%}
{%- if ns.is_output -%}{{- '<|outputs_end|>' -}}{%- endif -%}
{%- if add_generation_prompt and not ns.is_output -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""
# The tokens that a template's models take for control, where they are not seedling's own; the first of them ends a turn.
CONTROL = {
    LLAMA3: ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    MISTRAL: (
        *("</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    GEMMA: ("<end_of_turn>", "<bos>", "<start_of_turn>"),
    DEEPSEEK: (
        *("<|end_of_sentence|>", "<bos>", "<|User|>", "<|Assistant|>", "<|call|>", "<|sep|>", "<|end_call|>"),
        *("<|outputs|>", "<|outputs_end|>", "<|output|>", "<|end_output|>"),
    ),
}
ALL = {
    "plain": PLAIN,
    "hermes": HERMES,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "deepseek": DEEPSEEK,
}


@cache
def text_with(template: str) -> Text:
    """seedling's tokenizer with another template, and the control tokens that its models have."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(SEEDLING))
    tokenizer.chat_template = template
    control = CONTROL.get(template, ())
    tokenizer.add_special_tokens({"additional_special_tokens": [*control]})
    eos = control[0] if control else "<|im_end|>"
    return Text(tokenizer, frozenset({tokenizer.convert_tokens_to_ids(eos)}))
