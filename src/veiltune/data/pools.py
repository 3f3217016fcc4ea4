"""Word lists that invented persons are made of: names, streets and towns.

English first and last names are those of the package Faker, drawn evenly; everything else is invented here.
"""

from __future__ import annotations

from faker.providers.person.en_US import Provider as EnglishNames

EMAIL_DOMAINS = ("example.com", "example.net", "example.org", "mail.test")  # reserved by RFC 2606

FIRST_NAMES = tuple(EnglishNames.first_names)
LAST_NAMES = tuple(EnglishNames.last_names)
STREET_STEMS = (
    *(
        "Alder",
        "Amber",
        "Arden",
        "Bram",
        "Brindle",
        "Calder",
        "Clover",
        "Corrin",
        "Dapple",
        "Dunmor",
        "Elder",
        "Fallow",
    ),
    *("Fenner", "Galder", "Garnet", "Hazel", "Heron", "Hollin", "Ivel", "Juniper", "Kestrel", "Larken", "Linden"),
    *("Marlow", "Merrin", "Nettle", "Norwin", "Orchard", "Pellin", "Quill", "Raven", "Rowan", "Sable", "Sorrel"),
    *("Tamar", "Tansy", "Thistle", "Umber", "Vesper", "Wender", "Willow", "Wren", "Yarrow", "Zennor"),
)
STREET_ENDINGS = (
    *("bank", "beck", "brook", "combe", "croft", "dale", "field", "gate", "grove", "holm", "hurst", "ley", "mead"),
    *("mere", "moor", "ridge", "side", "stead", "thorpe", "vale", "wick", "wold", "wood", "worth"),
)
HOME_STREETS = ("Lane", "Street", "Avenue", "Road", "Drive", "Court", "Terrace", "Crescent")
WORK_STREETS = ("Plaza", "Parkway", "Square", "Boulevard")
WORK_PLACES = ("Suite", "Room", "Office", "Unit")
TOWN_STEMS = (
    *("Ald", "Barrow", "Bel", "Brack", "Carn", "Cor", "Dron", "Els", "Farn", "Glen", "Hal", "Ing", "Kel", "Lam", "Mel"),
    *("Nor", "Os", "Pen", "Quen", "Rad", "Sel", "Tol", "Ul", "Ver", "Wen", "Yel"),
)
TOWN_ENDINGS = (
    *("by", "bourne", "bridge", "burn", "bury", "den", "don", "ferry", "ford", "ham", "haven", "minster", "mouth"),
    *("port", "ton", "verton", "well", "wich"),
)

SURNAMES_ZH = (
    *(("王", "wang"), ("李", "li"), ("张", "zhang"), ("刘", "liu"), ("陈", "chen"), ("杨", "yang"), ("黄", "huang")),
    *(("赵", "zhao"), ("吴", "wu"), ("周", "zhou"), ("徐", "xu"), ("孙", "sun"), ("马", "ma"), ("朱", "zhu")),
    *(("胡", "hu"), ("郭", "guo"), ("何", "he"), ("林", "lin"), ("罗", "luo"), ("郑", "zheng"), ("梁", "liang")),
    *(("谢", "xie"), ("宋", "song"), ("唐", "tang"), ("许", "xu"), ("邓", "deng"), ("冯", "feng"), ("韩", "han")),
    *(("曹", "cao"), ("曾", "zeng"), ("彭", "peng"), ("萧", "xiao"), ("蔡", "cai"), ("潘", "pan"), ("田", "tian")),
    *(("董", "dong"), ("袁", "yuan"), ("于", "yu"), ("余", "yu"), ("叶", "ye"), ("蒋", "jiang"), ("杜", "du")),
    *(("苏", "su"), ("魏", "wei"), ("程", "cheng"), ("吕", "lv"), ("丁", "ding"), ("沈", "shen"), ("任", "ren")),
    *(("姚", "yao"), ("卢", "lu"), ("傅", "fu"), ("钟", "zhong"), ("姜", "jiang"), ("崔", "cui"), ("谭", "tan")),
)
GIVEN_ZH = (
    *(
        ("岚", "lan"),
        ("彦", "yan"),
        ("舒", "shu"),
        ("泽", "ze"),
        ("霖", "lin"),
        ("瑾", "jin"),
        ("琪", "qi"),
        ("睿", "rui"),
    ),
    *(("晗", "han"), ("翊", "yi"), ("璇", "xuan"), ("哲", "zhe"), ("菲", "fei"), ("骏", "jun"), ("珂", "ke")),
    *(("蓉", "rong"), ("峻", "jun"), ("楠", "nan"), ("婷", "ting"), ("昊", "hao"), ("雯", "wen"), ("澜", "lan")),
    *(("祺", "qi"), ("芮", "rui"), ("旭", "xu"), ("薇", "wei"), ("铭", "ming"), ("妍", "yan"), ("朗", "lang")),
    *(("颖", "ying"), ("毅", "yi"), ("倩", "qian"), ("博", "bo"), ("瑶", "yao"), ("凯", "kai"), ("莹", "ying")),
    *(("轩", "xuan"), ("蕾", "lei"), ("宸", "chen"), ("洁", "jie"), ("诚", "cheng"), ("娜", "na"), ("锐", "rui")),
    *(("萱", "xuan"), ("涛", "tao"), ("娟", "juan"), ("杰", "jie"), ("琳", "lin"), ("磊", "lei"), ("燕", "yan")),
    *(("勇", "yong"), ("艳", "yan"), ("斌", "bin"), ("梅", "mei"), ("鹏", "peng"), ("芳", "fang"), ("浩", "hao")),
    *(("静", "jing"), ("健", "jian"), ("玲", "ling"), ("超", "chao"), ("霞", "xia"), ("辉", "hui"), ("敏", "min")),
)
CITIES_ZH = (
    "云川",
    "青岚",
    "松溪口",
    "白鹭",
    "临泽湾",
    "锦桥",
    "望江台",
    "石榆",
    "清渡",
    "枫桥镇",
    "南屏岭",
    "长汀渡",
    "蓝溪",
    "银杏",
    "玉河",
    "晴川",
)
STREETS_ZH = (
    *("松涧", "明渠", "听雨", "梧桐", "望月", "采莲", "海棠", "竹影", "流霞", "青石", "百草", "临风", "紫藤", "芦花"),
    *("鹤鸣", "茶山", "云锦", "白杨", "丹桂", "碧波", "星河", "晓风", "古槐", "长亭"),
)
BUILDINGS_ZH = ("星澜", "启明", "恒远", "蓝图", "锦程", "天工", "云帆", "博雅")
