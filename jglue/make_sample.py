#!/usr/bin/env python3
"""Write the sample beside this file: small data sets of our own in JGLUE's formats.

    python make_sample.py             writes sample/datasets/{jsquad,jcommonsenseqa,jnli,jsts}-v1.3/
    python make_sample.py --output_dir other --seed 1         (the same seed gives the same bytes)

The JSQuAD part is what quickstart learns: who bought what, where and when, and questions that are
answered by copying a piece of the sentence. Two things that stand together in a validation sentence
(a person and a place, an item and a date, ...) never do in a training sentence: a model that only
remembers the training answers scores 0 on validation, one that has learnt to read scores 1.
"""

import argparse
import json
import random
import sys
from itertools import combinations, product
from pathlib import Path

VERSION = "v1.3"  # the version of JGLUE whose formats these are

# ---- JSQuAD: who bought what, where and when ----

NAMES = (
    "佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤 吉田 山田 山口 松本 井上 木村 清水 山崎 "
    "池田 橋本 石川 山下 中島 石井 小川 前田 岡田 藤田 後藤 近藤 村上 遠藤 青木 坂本 福田 太田 "
    "西村 藤井 金子 岡本 藤原 中野 三浦 原田 中川 松田 竹内 小野 田村 中山 和田 石田 森田 上田 "
    "内田 柴田 酒井 宮崎 横山 高木"
).split()
ITEMS = (
    "辞書 鉛筆 手帳 絵本 地図 封筒 切手 定規 帽子 手袋 靴下 着物 浴衣 下駄 時計 眼鏡 指輪 財布 "
    "電池 茶碗 急須 包丁 水筒 毛布 花瓶 本棚 椅子 りんご みかん ぶどう すいか いちご 大根 人参 "
    "白菜 豆腐 味噌 醤油 砂糖 蜂蜜 緑茶 紅茶 牛乳 饅頭 団子 煎餅 羊羹 石鹸"
).split()
AREAS = "駅前 港町 北町 南町 桜台 川端 城下 緑丘 浜辺 坂上 寺町 新町".split()
SHOPS = "市場 百貨店 雑貨店 商店街 朝市 売店".split()
TIMES = "早朝 朝 昼前 正午 昼過ぎ 夕方 夜 深夜".split()
FACT = {
    "who": [f"{name}さん" for name in NAMES],
    "what": ITEMS,
    "where": [f"{area}の{shop}" for area in AREAS for shop in SHOPS],
    "when": [f"{day}曜日の{time}" for day in "月火水木金土日" for time in TIMES],
}
SENTENCES = [
    "{when}、{who}は{where}で{what}を買った。",
    "{who}は{when}、{where}で{what}を買った。",
    "{when}、{who}は{what}を{where}で買った。",
]
QUESTIONS = {
    "what": "{who}は何を買いましたか。",
    "where": "{who}はどこで買い物をしましたか。",
    "when": "{who}が買い物をしたのはいつですか。",
    "who": "{what}を買ったのは誰ですか。",
}
TRAIN_FACTS, VALIDATION_FACTS = 2200, 60


def jsquad(rng):
    """Return both splits; no two things of a validation fact stand together in another fact."""
    facts, taken = {"valid": [], "train": []}, set()
    for split, count in (("valid", VALIDATION_FACTS), ("train", TRAIN_FACTS)):
        while len(facts[split]) < count:
            fact = {kind: rng.choice(things) for kind, things in FACT.items()}
            pairs = set(combinations(sorted(fact.items()), 2))
            if not pairs & taken:
                facts[split].append(fact)
                if split == "valid":
                    taken |= pairs
    return {"train": squad(rng, facts["train"], "t"), "valid": squad(rng, facts["valid"], "v")}


def squad(rng, facts, prefix):
    """SQuAD 1.1 JSON, an article with one paragraph for each fact; context: `title [SEP] text`."""
    articles = []
    for number, fact in enumerate(facts):
        context = "買い物 [SEP] " + rng.choice(SENTENCES).format(**fact)
        questions = []
        for n, asked in enumerate(rng.sample(list(QUESTIONS), len(QUESTIONS))):
            question = {"question": QUESTIONS[asked].format(**fact), "id": f"{prefix}{number}q{n}"}
            answer = {"text": fact[asked], "answer_start": context.index(fact[asked])}
            questions.append({**question, "answers": [answer], "is_impossible": False})
        articles.append({"title": "買い物", "paragraphs": [{"qas": questions, "context": context}]})
    return {"version": "sample", "data": articles}


# ---- JCommonsenseQA: which of five things is meant ----

THINGS = {  # NAME：QUESTION, of six kinds
    "道具": """
        傘：雨の日に頭の上に広げて差すものは？ はさみ：二枚の刃で紙や布を切る道具は？
        鉛筆：黒い芯で字を書き、消しゴムで消せるものは？
        箸：二本をそろえて持ち、食べ物をつまむものは？ 時計：今の時刻を知りたいときに見るものは？
        鏡：自分の顔を映して見るものは？ 枕：寝るときに頭の下に置くものは？
        ほうき：床や庭のごみを掃いて集める道具は？ 財布：お金を入れて持ち歩くものは？
        鍵：扉の穴に差しこんで回すものは？ 金槌：釘を打つときに使う道具は？
        温度計：部屋の暑さや寒さをはかるものは？ 望遠鏡：遠くの星を大きく見るための道具は？
        辞書：知らない言葉の意味を調べるときに引くものは？
        やかん：水を入れて火にかけ、湯を沸かすものは？ 扇風機：羽根を回して風を送る電気製品は？
        冷蔵庫：食べ物を冷やして保存する電気製品は？ 掃除機：ごみを吸い取る電気製品は？
        洗濯機：汚れた服を入れて洗う電気製品は？ 定規：まっすぐな線を引くときに当てるものは？
    """,
    "生き物": """
        象：長い鼻で物をつかむ動物は？ きりん：首がとても長く、高い木の葉を食べる動物は？
        ペンギン：空は飛べないが泳ぎの得意な鳥は？
        こうもり：洞窟にぶら下がり、夜になると飛ぶ動物は？ 亀：背中に固い甲羅がある動物は？
        蛇：足がなく、体をくねらせて進む動物は？ 蜂：花の蜜を集め、尻の針で刺すこともある虫は？
        蛍：夏の夜、川辺で尻を光らせる虫は？ 蝉：夏に木に止まって大きな声で鳴く虫は？
        カンガルー：おなかの袋で子を育て、跳ねて進む動物は？
        らくだ：背中にこぶがあり、砂漠で荷物を運ぶ動物は？ しまうま：白と黒の縞模様の動物は？
        にわとり：朝早くに大きな声で鳴く、飼われることの多い鳥は？
        牛：乳をしぼって飲む、角のある大きな動物は？ 羊：毛を刈って毛糸にする動物は？
        たこ：八本の足で墨を吐く海の生き物は？ 鯨：海に住み、背中から潮を吹く動物は？
        蛙：おたまじゃくしが育つと何になる？ 蝶：青虫がさなぎになり、そのあと何になる？
        猫：ねずみを捕り、こたつを好むといわれる動物は？
    """,
    "食べ物": """
        豆腐：大豆の汁を固めた、白くて四角い食べ物は？ 納豆：大豆を発酵させた、糸を引く食べ物は？
        寿司：酢飯に刺身をのせて握った料理は？ おにぎり：ご飯を三角に握り、海苔を巻いた食べ物は？
        チーズ：牛乳を固めて熟成させた食べ物は？ パン：小麦粉の生地をふくらませて焼いた食べ物は？
        蜂蜜：蜂が花から集める甘いものは？ 砂糖：さとうきびから作る甘い調味料は？
        塩：海水を煮つめると残る、しょっぱい調味料は？ レモン：黄色くて、とても酸っぱい果物は？
        すいか：夏に砂浜で目隠しをして割る遊びに使うものは？
        バナナ：皮をむいて食べる、曲がって細長い果物は？
        柿：秋に実り、干しても食べるだいだい色の果物は？
        餅：蒸したもち米をついて作り、正月に食べるものは？ そば：大晦日に年越しとして食べる麺は？
        緑茶：摘んだ葉を蒸して揉み、湯を注いで飲むものは？
        カレーライス：香辛料のきいた汁をご飯にかけた料理は？
        梅干し：梅の実を塩漬けにして日に干したものは？
        アイスクリーム：牛乳や卵を凍らせた、冷たい菓子は？
        味噌汁：豆から作る茶色の調味料を溶いた汁物は？
    """,
    "場所": """
        図書館：本を借りる所は？ 病院：けがや病気を治してもらう所は？
        郵便局：手紙や小包を出しに行く所は？ 駅：列車に乗り降りする所は？ 空港：飛行機に乗る所は？
        港：船が着く所は？ 銀行：お金を預ける所は？ 消防署：火事に備えて赤い車が待っている所は？
        交番：落とし物を届け、道を尋ねる所は？ 映画館：暗い部屋で大きな画面の作品を見る所は？
        動物園：象やきりんを見に行く所は？ 水族館：大きな水槽の魚を見る所は？
        美術館：絵や彫刻を見る所は？ 学校：子どもが授業を受ける所は？
        神社：鳥居をくぐってお参りする所は？ 温泉：地中から湧いた湯につかる所は？
        牧場：牛や馬を放して育てる所は？ 田んぼ：水を張って稲を育てる所は？
        灯台：岬に立ち、夜の海を照らす建物は？ 床屋：髪を切ってもらう所は？
    """,
    "仕事": """
        医者：病人を診察し、薬を決める人は？ 教師：教室で生徒に勉強を教える人は？
        大工：木で家を建てる人は？ 漁師：船で海に出て魚をとる人は？
        農家：畑を耕して野菜を育てる人は？ 操縦士：飛行機を飛ばす人は？ 作家：小説を書く人は？
        画家：絵を描く人は？ 歌手：舞台で歌を歌う人は？ 料理人：店の台所で客の食事を作る人は？
        弁護士：裁判で依頼人を守る人は？ 消防士：火事の火を消す人は？ 警察官：泥棒を捕まえる人は？
        俳優：映画や劇で役を演じる人は？ 記者：事件を取材して新聞に書く人は？
        通訳：外国語の話をその場で訳す人は？ 宇宙飛行士：ロケットに乗って地球の外へ行く人は？
        獣医：動物の病気を治す人は？ 審判：試合で反則や得点を判定する人は？
        運転手：バスを走らせて客を運ぶ人は？
    """,
    "自然": """
        虹：雨上がりの空にかかる七色の帯は？ 雪：冬に空から白く降り積もるものは？
        雷：光ったあと、ごろごろと音がするものは？
        霧：朝、あたりが白くかすんで遠くが見えなくなるものは？
        台風：夏から秋に南の海で生まれ、強い風と雨をもたらすものは？
        地震：地面が突然揺れることを何という？ 火山：溶岩を噴き出す山は？
        滝：崖から水が落ちている所は？ 月：夜空で満ち欠けして見えるものは？
        太陽：東から昇り、昼の空を明るくするものは？
        流れ星：消える前に願いごとを唱えるとよいといわれるものは？
        紅葉：秋に木の葉が赤や黄色に変わることを何という？
        津波：海底の揺れのあとに押し寄せる大きな波は？ 砂漠：雨がほとんど降らず、砂ばかりの土地は？
        島：まわりをすべて水に囲まれた陸地は？ 森：たくさんの木が茂っている所は？
        川：山から海へ流れる水の道は？ 氷山：冷たい海に浮かぶ大きな氷のかたまりは？
        夕焼け：日が沈むころ、西の空が赤く染まることを何という？
        潮：月の引力で満ちたり引いたりする海の水を何という？
    """,
}


def jcommonsenseqa(rng):
    """Return 84 training and 36 validation questions; all five choices are of the same kind."""
    splits = {"train": [], "valid": []}
    for text in THINGS.values():
        kind = dict(thing.split("：") for thing in text.split())
        for place, name in enumerate(rng.sample(list(kind), len(kind))):
            choices = rng.sample([other for other in kind if other != name], 4)
            choices.insert(rng.randrange(5), name)
            row = {f"choice{n}": choice for n, choice in enumerate(choices)}
            row = {"question": kind[name], **row, "label": choices.index(name)}
            splits["valid" if place % 3 == 2 else "train"].append(row)
    rows = [row for split in splits.values() for row in rng.sample(split, len(split))]
    rows = [{"q_id": number, **row} for number, row in enumerate(rows)]
    return {"train": rows[: len(splits["train"])], "valid": rows[len(splits["train"]) :]}


# ---- JNLI and JSTS: pairs of sentences that describe pictures ----

PEOPLE = {"男性": "人", "女性": "人", "男の子": "子ども", "女の子": "子ども"}
PEOPLE |= {"おじいさん": "人", "おばあさん": "人"}
CLOTHES = ["赤い帽子", "青いシャツ", "白いコート", "黄色いセーター", "黒いめがね"]
SCENES = {
    "公園": ["ベンチに座って", "犬と散歩して", "ボールで遊んで", "写真を撮って"],
    "駅": ["電車を待って", "切符を買って", "新聞を読んで", "電話をかけて"],
    "海辺": ["砂の城を作って", "貝を拾って", "釣りをして", "波を眺めて"],
    "台所": ["野菜を切って", "皿を洗って", "魚を焼いて", "お茶をいれて"],
    "教室": ["本を読んで", "絵を描いて", "黒板を消して", "楽器を弾いて"],
    "庭": ["花に水をやって", "落ち葉を掃いて", "木を切って", "洗濯物を干して"],
}
HYPOTHESES = {
    "entailment": "{at}に{who}がいます。 {kind}が{act}います。 {who}が{act}います。",
    "contradiction": "{at}には誰もいません。 その{who}は眠っています。 {at}にいるのは馬だけです。",
    "neutral": "{who}は友人を待っています。 {who}は近くに住んでいます。 {who}は歌を歌っています。",
}


def jnli(rng):
    """Return 162 training and 54 validation pairs, a third of each relation."""
    rows = []
    for person, (place, acts) in product(PEOPLE, SCENES.items()):
        act = rng.choice(acts)
        premise = f"{place}で{rng.choice(CLOTHES)}の{person}が{act}います。"
        scene = {"who": person, "kind": PEOPLE[person], "at": place, "act": act}
        for label, hypotheses in HYPOTHESES.items():
            for hypothesis in rng.sample(hypotheses.split(), 2):
                rows.append((premise, hypothesis.format(**scene), label))
    return split_pairs(rng, rows)


def jsts(rng):
    """Return 189 training and 63 validation pairs; the more they share, the closer they are."""
    rows = []
    for person, place in product(PEOPLE, SCENES):
        act, other = rng.sample(SCENES[place], 2)
        somewhere = rng.choice([name for name in SCENES if name != place])
        someone = rng.choice([name for name in PEOPLE if name != person])
        first = f"{place}で{person}が{act}います。"
        rows += [
            (first, f"{person}が{place}で{act}いるところです。", rng.choice([4.8, 5.0])),
            (first, f"{place}で{PEOPLE[person]}が{act}いる。", rng.choice([4.0, 4.2, 4.4])),
            (first, f"{person}が{act}いるようすです。", rng.choice([3.6, 3.8])),
            (first, f"{place}で{someone}が{act}います。", rng.choice([3.0, 3.2])),
            (first, f"{place}で{person}が{other}います。", rng.choice([2.0, 2.2, 2.4])),
            (first, f"{place}に{someone}がいて、{other}います。", rng.choice([1.2, 1.4])),
        ]
        third = f"{somewhere}で{someone}が{rng.choice(SCENES[somewhere])}います。"
        rows.append((first, third, rng.choice([0.0, 0.2])))
    return split_pairs(rng, rows)


def split_pairs(rng, rows):
    """Return the splits as JGLUE's rows; the first sentences of the two do not overlap."""
    firsts = list(dict.fromkeys(first for first, _, _ in rows))
    held_out = set(rng.sample(firsts, len(firsts) // 4))
    splits = {}
    for split in ("train", "valid"):
        chosen = [row for row in rows if (row[0] in held_out) == (split == "valid")]
        rng.shuffle(chosen)
        splits[split] = []
        for n, (first, second, label) in enumerate(chosen):
            row = {"sentence_pair_id": str(n), "yjcaptions_id": f"{n}-{2 * n}-{2 * n + 1}"}
            splits[split].append({**row, "sentence1": first, "sentence2": second, "label": label})
    return splits


# ---- Writing ----


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, rows):
    """Write JSQuAD's one document, or the other tasks' JSON Lines (JGLUE calls both .json)."""
    lines = [rows] if isinstance(rows, dict) else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"{path}  {path.stat().st_size:,} bytes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, sample = parser.add_argument, Path(__file__).resolve().parent / "sample"
    add("--output_dir", type=Path, default=sample, help="default: sample beside this file")
    add("--seed", type=int, default=0, help="the committed sample is that of seed 0")
    args = parser.parse_args(argv)
    try:
        for make in (jsquad, jcommonsenseqa, jnli, jsts):
            for split, rows in make(random.Random(args.seed)).items():
                folder = args.output_dir / "datasets" / f"{make.__name__}-{VERSION}"
                write(folder / f"{split}-{VERSION}.json", rows)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}). Name another --output_dir.")


if __name__ == "__main__":
    main()
