"""Embedder.encode from two vLLM servers of one checkpoint: one writes the rationale, one pools.

    vllm serve FOLDER --port 8000 --runner generate --logprobs-mode processed_logprobs
    vllm serve FOLDER --port 8001 --runner pooling
    python docs/reasoned_vllm.py FOLDER CHATS.jsonl

A line of CHATS.jsonl is a chat: the messages of an OpenAI request. See reasoned_vllm.md.
Up to `compare` the standard library is enough.
"""

import json
import math
import sys
from pathlib import Path
from urllib.request import Request, urlopen

WRITER = "http://127.0.0.1:8000/v1/chat/completions"
POOLER = "http://127.0.0.1:8001/v1/embeddings"


def ask(url, messages, **options):
    """Messages -> the server's JSON. A last message of the assistant is gone on with."""
    begun = messages[-1]["role"] == "assistant"
    options |= {"add_generation_prompt": not begun, "continue_final_message": begun}
    body = json.dumps({"messages": messages, **options}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


def begin(messages, text):
    """The messages, and the beginning of the assistant's answer to them."""
    return [*messages, {"role": "assistant", "content": text}]


def read_markers(folder):
    """{marker: id} of the tokenizer's added tokens."""
    tokenizer = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def decide(messages, markers):
    """p_reason, from the log-probabilities of the answer's first token."""
    two = [markers["<think>"], markers["<|endoftext|>"]]
    # The server's logprobs are processed: the softmax is over these two tokens alone.
    options = {"allowed_token_ids": two, "logprobs": True, "top_logprobs": 2}
    answer = ask(WRITER, messages, max_completion_tokens=1, **options)
    first = answer["choices"][0]["logprobs"]["content"][0]
    logprobs = {token["token"]: token["logprob"] for token in first["top_logprobs"]}
    return math.exp(logprobs["<think>"])  # and of <|endoftext|> the rest: they sum to 1


def write(messages, markers, max_new_tokens):
    """The reasoned answer, greedy, and its number of tokens with the prompt's."""
    end = markers["</think>"]  # the server stops here, and leaves it out of the text
    # A rationale holds no marker, as in Processor.suppress_tokens: no second image, no early end.
    never = {i: -100 for i in markers.values() if i != end}
    options = {"temperature": 0, "stop_token_ids": [end], "logit_bias": never}
    options["max_completion_tokens"] = max_new_tokens
    result = ask(WRITER, begin(messages, "<think>\n"), **options)
    choice = result["choices"][0]
    cut = choice["finish_reason"] == "length"  # then it is closed by force: two tokens more
    closing = "\n</think>\n\n" if cut else "</think>\n\n"
    answer = "<think>\n" + choice["message"]["content"] + closing
    num_tokens = result["usage"]["total_tokens"] + 2  # "\n\n" and <|endoftext|>
    return answer, num_tokens + 2 if cut else num_tokens


def embed(messages, markers, threshold=0.5, max_new_tokens=128):
    """A chat -> unit vector and {"p_reason", "answer", "same_tokens"}. Threshold -1 is "always".

    same_tokens: the pooling server read as many tokens as were written. False where the answer's
    text is split into other tokens than it was sampled in: then this is not encode's vector.
    """
    info = {"p_reason": decide(messages, markers), "answer": "", "same_tokens": True}
    if info["p_reason"] > threshold:
        info["answer"], num_tokens = write(messages, markers, max_new_tokens)
        messages = begin(messages, info["answer"])
    pooled = ask(POOLER, messages, add_special_tokens=True)  # appends <|endoftext|>
    if info["answer"]:
        info["same_tokens"] = pooled["usage"]["prompt_tokens"] == num_tokens
    return pooled["data"][0]["embedding"], info


def compare(folder, path, max_new_tokens=24):
    """Prints how far the servers' vector and p_reason of each chat are from Embedder.encode's."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from embed import Embedder

    markers = read_markers(folder)
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype="float32")
    options = {"max_new_tokens": max_new_tokens, "return_info": True}
    thresholds = {"always": -1, "auto": 0.5}
    if not embedder.processor.trained_here:
        del thresholds["auto"]  # it never decides
    for line in Path(path).read_text("utf-8").splitlines():
        messages = json.loads(line)
        for reason, threshold in thresholds.items():
            vector, info = embed(messages, markers, threshold, max_new_tokens)
            want, infos = embedder.encode({"messages": messages}, reason=reason, **options)
            # The largest difference of any of the vector's numbers
            far = abs(want[0] - vector).max()
            far_p = abs(infos[0]["p_reason"] - info["p_reason"])
            print(f"{reason}: vector off by {far:.0e}, p_reason by {far_p:.0e}; {info}")


if __name__ == "__main__":
    compare(*sys.argv[1:])
