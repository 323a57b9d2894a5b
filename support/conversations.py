"""Instruction data: synthetic conversations of two people over several sessions, each fact said once in passing, with
questions about the facts. The phrasings are in conversations.txt, whose header explains the format:

    python -m support.conversations --count 3000 --seed 0 --out conversations.jsonl
"""

import argparse
import json
import os
import random
import re
from pathlib import Path

from tqdm import tqdm

from support.files import InputError, run_command
from support.text import whole_words

SLOT = re.compile(r"\{(\w+)\}")
BENDING = ["", "'s", "does", "has", "is", "was", "they", "their", "them"]  # the "@" words of a question ...
VOICES = {  # ... as they read for a named speaker (by the gender of the name), as "you" and as "I"
    "name_f": "NAME NAME's does has is was she her her",
    "name_m": "NAME NAME's does has is was he his him",
    "name_n": "NAME NAME's does has is was they their them",
    "you": "you your do have are were you your you",
    "I": "I my do have am was I my me",
}
# first words that lose their capital after a lead such as "By the way,"; names and "I" keep theirs.
COMMON = set("A After As At Because Before Behind Being Come Dinner Do Everyone Every Friends Guess Have If In Keep "
             "It's My On Our People Please The There There's They Turns To We We'll We're We've When Work You".split())


def read_templates(path):
    """The slot lists, the small talk by role and the kinds of facts of a template file."""
    lists, talk, kinds = {}, {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, rest = line[:1], line[2:]
        if mark == "[":
            section, name, *twice = line.strip("[]").split()
            if section == "fact":
                kinds.append({"topic": name, "twice": bool(twice), "-": [], "+": [], "?": [], "=": {}})
        elif mark == "=":
            kinds[-1]["="][rest.split(": ")[0]] = rest.split(": ")[1].split(" | ")
        elif mark and mark != "#" and section == "fact":
            kinds[-1][mark].append(rest)
        elif mark and mark != "#":
            {"list": lists, "say": talk}[section].setdefault(name, []).extend(line.split(" | "))
    return lists, talk, kinds


def fill(text, values, rng):
    """The text with its alternatives chosen and its slots filled; "a" becomes "an" where the value needs it."""
    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: rng.choice(m[1].split("|")), text)
    text = SLOT.sub(lambda m: "\0" + values[m[1]], text)
    text = re.sub(r"\b([Aa]) \0(?!eu|one\b)(?=[aeio]|u(?!ni|ku|se))", r"\1n ", text, flags=re.IGNORECASE)
    return " ".join(text.replace("\0", "").split())


def draw_facts(count, lists, kinds, used, rng):
    """Facts of distinct topics for both speakers, now and then one of the same kind for each; no value comes twice."""
    facts = []
    for kind in rng.sample(kinds, len(kinds)):
        if len(facts) >= count or kind["topic"] in {fact["kind"]["topic"] for fact in facts}:
            continue
        owner, shared = rng.randrange(2), kind["twice"] and len(kind["-"]) > 1 and rng.random() < 0.25
        for i, statement in enumerate(rng.sample(kind["-"], 1 + shared)):
            values = {}
            for slot in dict.fromkeys(SLOT.findall(statement)):
                options = kind["="].get(slot) or lists[slot.rstrip("0123456789")]
                values[slot] = rng.choice([option for option in options if option.lower() not in used] or options)
                used.add(values[slot].lower())
            told = fill(statement, values, rng)
            facts.append({"kind": kind, "owner": owner ^ i, "values": values, "told": told, "shared": shared})
    return rng.sample(facts, len(facts))


def write_session(facts, first, say, chatty, rng):
    """The turns [speaker, text] of one session that tells the facts in order; say(role, speaker) is small talk."""
    who = rng.randrange(2)
    turns = [[who, say("open_first" if first else "open_later", who)], [1 - who, say("open_reply", 1 - who)]]

    def go_on(text):
        """Adds to the turn; what follows a " > " is the other speaker's."""
        for i, part in enumerate(text.split(" > ")):
            if i:
                turns.append([1 - turns[-1][0], ""])
            turns[-1][1] = f"{turns[-1][1]} {part}".strip()

    for fact in facts:
        if rng.random() < chatty:
            go_on(say("shift" if rng.random() < 0.1 else "chat"))
        if fact["owner"] != turns[-1][0]:
            go_on(say("prompt") + " > ")
        lead, tail = (say(role) if rng.random() < share else "" for role, share in (("lead", 0.3), ("tail", 0.2)))
        lower = lead.endswith(",") and re.split("[ ,]", fact["told"])[0] in COMMON
        go_on(f"{lead} {fact['told'][0].lower() if lower else fact['told'][0]}{fact['told'][1:]} {tail}".strip())
        go_on(" > " + (rng.choice(fact["kind"]["+"] or [say("react")]) if rng.random() < 0.6 else say("react")))
    go_on(say("close") + " > " + say("close_reply"))
    return turns


def ask(fact, name, gender, talk, rng):
    """A question about one fact and its answer; where both speakers have such a fact, it gives the name."""
    fitting = [(slot, text) for slot, text in (line.split(" ", 1) for line in fact["kind"]["?"])
               if {slot, *SLOT.findall(text)} <= set(fact["values"]) and ("@" in text or not fact["shared"])]
    slot, text = rng.choice(fitting or [("", "")])
    voice = gender if fact["shared"] else rng.choices([gender, "you", "I"], [3, 1, 1])[0]
    words = {key: word.replace("NAME", name) for key, word in zip(BENDING, VOICES[voice].split())}
    text = re.sub("@([a-z]+|'s|)", lambda m: words[m[1]], fill(text, fact["values"], rng))
    text = re.sub("^One of them", rng.choice(talk["somebody"]), text)
    lead = rng.choice(talk["ask"]) + " " if voice in ("you", "I") and rng.random() < 0.2 else ""
    return lead + text[:1].upper() + text[1:], fact["values"].get(slot, "")


def write_conversation(lists, talk, kinds, rng):
    """The text of a conversation and its questions; an answer stands in the text once, and not in its question."""
    genders = rng.choices(["name_f", "name_m", "name_n"], [4, 4, 2], k=2)
    names = [rng.choice(lists[gender]) for gender in genders]
    if names[0] == names[1] or rng.random() < 0.5:
        names, genders = ["Speaker 1", "Speaker 2"], ["name_n", "name_n"]
    decks = {role: [] for role in talk}         # small talk comes again only when all of its role is used up

    def say(role, speaker=0):
        if not decks[role]:
            lines = [line for line in talk[role] if names[0] != "Speaker 1" or "{other}" not in line]
            decks[role] = rng.sample(lines, len(lines))
        return decks[role].pop().replace("{other}", names[1 - speaker])

    facts = draw_facts(rng.randint(12, 24), lists, kinds, {name.lower() for name in names}, rng)
    cuts = [0, *sorted(rng.sample(range(2, len(facts) - 1, 2), rng.randint(2, 4))), len(facts)]
    sessions = [write_session(facts[a:b], a == 0, say, rng.uniform(0, 0.6), rng) for a, b in zip(cuts, cuts[1:])]
    context = "\n\n".join("\n".join(f"{names[who]}: {text}" for who, text in turns) for turns in sessions)
    asked = [ask(fact, names[fact["owner"]], genders[fact["owner"]], talk, rng) for fact in facts]
    asked = rng.sample(asked, min(len(asked), rng.randint(10, 20)))
    qas = [{"question": q, "answers": [a]} for q, a in asked
           if len((words := whole_words(a)).findall(context)) == 1 and not words.search(q)]
    return context, qas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="conversations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="a new .jsonl file, for train.py --stage instruct --data")
    args = parser.parse_args()
    if os.path.exists(args.out) or not os.path.isdir(os.path.dirname(args.out) or "."):
        raise InputError(f"--out {args.out}: name a new file, in a directory that exists")
    if args.count < 1:
        raise InputError(f"--count {args.count}: write at least 1 conversation")
    templates = read_templates(Path(__file__).with_suffix(".txt"))
    rng, rows = random.Random(args.seed), []
    bar = tqdm(total=args.count, unit="conversation")
    while len(rows) < args.count:
        context, qas = write_conversation(*templates, rng)
        if 450 <= len(context.split()) <= 1000 and len(qas) >= 10:
            row = {"dataset": "conversations", "id": f"{args.seed}-{len(rows)}", "context": context, "qas": qas}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
            bar.update()
    Path(args.out).write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
