#!/usr/bin/env python3
"""Write the sample that comes with these lessons: four small data sets of our own in exactly JGLUE's file formats.

    python make_sample.py --output_dir sample            (what `sample/` holds; the same seed gives the same bytes)

JSQuAD: a sentence says who bought what, where and when, and three of four questions can be answered by copying a piece
of it. Train and validation share no question-and-text and no pair of things (the same person with the same place, the
same item with the same date, ...), so that a model which only remembers the training answers scores about 0 on
validation; one that has learnt to read scores 1. The other three have some dozens of rows, enough to try the commands
on. All text is our own.
"""

import argparse
import json
import random
import sys
from itertools import combinations
from pathlib import Path

NAMES = (
    "佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤 吉田 山田 山口 松本 井上 木村 清水 山崎 池田 橋本 "
    "石川 山下 中島 石井 小川 前田 岡田 藤田 後藤 近藤 村上 遠藤 青木 坂本 福田 太田 西村 藤井 金子 岡本 "
    "藤原 中野 三浦 原田 中川 松田 竹内 小野 田村 中山 和田 石田 森田 上田 内田 柴田 酒井 宮崎 横山 高木"
).split()
ITEMS = (
    "辞書 鉛筆 手帳 絵本 地図 封筒 切手 定規 帽子 手袋 靴下 着物 浴衣 下駄 時計 眼鏡 指輪 財布 電池 茶碗 "
    "急須 包丁 水筒 毛布 花瓶 本棚 椅子 りんご みかん ぶどう すいか いちご 大根 人参 白菜 豆腐 味噌 醤油 "
    "砂糖 蜂蜜 緑茶 紅茶 牛乳 饅頭 団子 煎餅 羊羹 石鹸"
).split()
AREAS = "駅前 港町 北町 南町 桜台 川端 城下 緑丘 浜辺 坂上 寺町 新町".split()
SHOPS = "市場 百貨店 雑貨店 商店街 朝市 売店".split()
THINGS = {
    "who": [f"{name}さん" for name in NAMES],
    "what": ITEMS,
    "where": [f"{area}の{shop}" for area in AREAS for shop in SHOPS],
    "when": [f"{month}月{day}日" for month in range(1, 13) for day in range(1, 29)],
}
SENTENCES = [
    "{when}、{who}は{where}で{what}を買った。",
    "{who}が{where}で{what}を買ったのは{when}のことだ。",
    "{when}に{where}へ出かけた{who}は、{what}を買って帰った。",
    "{what}は、{who}が{when}に{where}で買ったものだ。",
]
# (what is asked, by what, how)
QUESTIONS = [
    ("what", "who", "{who}は何を買いましたか。"),
    ("where", "who", "{who}はどこで買い物をしましたか。"),
    ("when", "who", "{who}が買い物をしたのはいつですか。"),
    ("who", "what", "{what}を買ったのは誰ですか。"),
]
SEED, TRAIN_FACTS, VALIDATION_FACTS, QUESTIONS_PER_TEXT = 2023, 2200, 70, 3


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default="sample", help="directory to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of everything; another seed gives other data")
    args = parser.parse_args(argv)
    makers = {"jsquad": jsquad, "jcommonsenseqa": jcommonsenseqa, "jnli": jnli, "jsts": jsts}
    for task, maker in makers.items():
        for split, content in maker(random.Random(f"{args.seed} {task}")).items():
            path = Path(args.output_dir, "datasets", f"{task}-v1.3", f"{split}-v1.3.json")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
            except OSError as error:
                print(f"error: cannot write {path} ({error.strerror}). Choose another --output_dir", file=sys.stderr)
                raise SystemExit(2) from None
            print(f"{path}  {path.stat().st_size:,} bytes")


def draw(rng):
    """A fact: one of each kind of thing."""
    return {kind: rng.choice(things) for kind, things in THINGS.items()}


def pairs(fact):
    """Every two things of a fact."""
    return set(combinations(sorted(fact.items()), 2))


def jsquad(rng):
    """SQuAD 1.1 JSON, one paragraph an article; contexts read `title [SEP] text`, answers with their position."""
    validation, taken = [], set()
    while len(validation) < VALIDATION_FACTS:
        fact = draw(rng)
        if not pairs(fact) & taken:
            validation.append(fact)
            taken |= pairs(fact)
    train = []
    while len(train) < TRAIN_FACTS:
        fact = draw(rng)
        if not pairs(fact) & taken:
            train.append(fact)
    return {"train": squad(rng, train, "t"), "valid": squad(rng, validation, "v")}


def squad(rng, facts, prefix):
    articles = []
    for number, fact in enumerate(facts):
        context = "買い物 [SEP] " + rng.choice(SENTENCES).format(**fact)
        questions = []
        for n, (asked, _, text) in enumerate(rng.sample(QUESTIONS, QUESTIONS_PER_TEXT)):
            answer = {"text": fact[asked], "answer_start": context.index(fact[asked])}
            questions.append({"question": text.format(**fact), "id": f"{prefix}{number}q{n}", "answers": [answer],
                              "is_impossible": False})  # fmt: skip
        articles.append({"title": "買い物", "paragraphs": [{"qas": questions, "context": context}]})
    return json.dumps({"data": articles, "version": "sample"}, ensure_ascii=False, separators=(",", ":")) + "\n"


KINDS = {
    "果物": "りんご みかん ぶどう 梨 柿 桃".split(),
    "動物": "犬 猫 馬 牛 羊 うさぎ".split(),
    "楽器": "太鼓 笛 琴 三味線 ピアノ ギター".split(),
    "乗り物": "電車 自転車 船 飛行機 バス 馬車".split(),
    "文房具": "鉛筆 消しゴム 定規 はさみ のり 手帳".split(),
    "天気": "晴れ 雨 雪 曇り 霧 嵐".split(),
}


def jcommonsenseqa(rng):
    """JSON Lines; five choices, one of which is of the kind that is asked for."""
    rows = []
    for kind, members in KINDS.items():
        others = [member for other, rest in KINDS.items() if other != kind for member in rest]
        for member in members:
            for question in (f"次のうち、{kind}はどれですか。", f"{kind}と呼べるものはどれでしょう？"):
                choices, label = rng.sample(others, 4), rng.randrange(5)
                choices.insert(label, member)
                rows.append({"question": question, **{f"choice{n}": c for n, c in enumerate(choices)}, "label": label})
    return split(rng, rows, "q_id")


PLACES = "公園 駅 市場 学校 図書館 港 畑 橋".split()
PEOPLE = "男の子 女の子 老人 二人の女性 若い男性 先生".split()
# (what is seen, what follows from it, what cannot be at the same time, what may be)
SCENES = [
    ("走っている", "動いている", "眠っている", "急いでいる"),
    ("座って本を読んでいる", "座っている", "走っている", "試験の前だ"),
    ("歌いながら歩いている", "歩いている", "座っている", "歌手を目指している"),
    ("傘をさして立っている", "立っている", "横になっている", "誰かを待っている"),
    ("りんごを食べている", "何かを食べている", "何も口にしていない", "空腹だった"),
]


def jnli(rng):
    """JSON Lines; sentence pairs with entailment, contradiction or neutral."""
    rows = []
    for place in PLACES:
        for person in PEOPLE:
            seen, *thens = rng.choice(SCENES)
            kind = rng.randrange(3)
            rows.append({"yjcaptions_id": f"sample-{len(rows)}", "sentence1": f"{place}で{person}が{seen}。",
                         "sentence2": f"{person}が{thens[kind]}。",
                         "label": ("entailment", "contradiction", "neutral")[kind]})  # fmt: skip
    return split(rng, rows, "sentence_pair_id")


def jsts(rng):
    """JSON Lines; sentence pairs with a similarity from 0 to 5: of who, where and what, how much is the same."""
    rows = []
    for place in PLACES:
        for person in PEOPLE:
            scene = rng.choice(SCENES)
            same = [rng.random() < 0.6 for _ in range(3)]
            who = person if same[0] else rng.choice([p for p in PEOPLE if p != person])
            where = place if same[1] else rng.choice([p for p in PLACES if p != place])
            what = scene if same[2] else rng.choice([s for s in SCENES if s != scene])
            rows.append({"yjcaptions_id": f"sample-{len(rows)}", "sentence1": f"{place}で{person}が{scene[0]}。",
                         "sentence2": f"{who}が{where}で{what[0]}。",
                         "label": round(5 * (same[0] + same[1] + 2 * same[2]) / 4, 1)})  # fmt: skip
    return split(rng, rows, "sentence_pair_id")


def split(rng, rows, id_name):
    """Two thirds to train, one third to validation, as JSON Lines with ids (numbers in q_id, text elsewhere)."""
    rng.shuffle(rows)
    rows = [{id_name: n if id_name == "q_id" else str(n), **row} for n, row in enumerate(rows)]
    parts = {"train": rows[: len(rows) * 2 // 3], "valid": rows[len(rows) * 2 // 3 :]}
    return {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part) for name, part in parts.items()}


if __name__ == "__main__":
    main()
