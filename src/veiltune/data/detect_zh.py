"""Chinese names and addresses by what stands around them; the surnames are the hundred most common ones."""

# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from veiltune.data.detect_patterns import LIKELY, WEAK, Place

HAN = "\u3400-\u9fff"
_SURNAME = (
    "(?:欧阳|上官|司马|诸葛|司徒|夏侯|尉迟|皇甫|东方|慕容|"
    "[王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许邓冯韩曹曾彭萧肖蔡潘田董袁于余叶蒋杜苏魏程吕丁沈任姚卢傅钟姜崔谭廖范汪陆金"
    "石戴贾韦夏邱方侯邹熊孟秦白江阎薛尹段雷黎史龙陶贺顾毛郝龚邵万钱严覃武戚莫孔向汤])"
)
_CUE = (
    "(?:姓名|名字|患者|病人|客户|顾客|收件人|寄件人|联系人|员工|同事|申请人|被保险人|投保人|学生|学员|会员|住户|租客|租户|用户|乘客|访客"
    "|负责人|经办人|签收人|司机|我是|我叫|名叫|祝贺|恭喜|抬头应为|尊敬的|亲爱的|您好|你好|推荐|感谢)"
)
_END = rf"(?=[^{HAN}\w]|$)"
_LABEL = "(?:地址|电话|住址|邮箱|手机)"
_COMMON = "反说要的将已在于因和与为是把被从给对向有需会想请来去之并及等也就都"
_PATTERNS = (
    (re.compile(rf"{_CUE}[：:，, ]{{0,2}}({_SURNAME}[{HAN}]{{1,2}}){_END}"), LIKELY),
    (re.compile(rf"{_CUE}[：:]?[ ]?({_SURNAME}[{HAN}]{{2}})(?=[{_COMMON}])"), LIKELY),
    (re.compile(rf"{_CUE}[：:]?[ ]?({_SURNAME}[{HAN}][^{_COMMON}\W])"), WEAK),
    (re.compile(rf"(?<![{HAN}])({_SURNAME}[{HAN}]{{1,2}}?)(?=先生|女士|小姐|医生|老师|经理|教授)"), LIKELY),
    (re.compile(rf"(?:^|[。，、；：:\s(（])({_SURNAME}[{HAN}]{{1,2}})(?=[，、（(\s]*{_LABEL})"), WEAK),
    (re.compile(rf"[。！谢启上敬\n][ ]?({_SURNAME}[{HAN}]{{1,2}})[。]?(?=\s*$)"), WEAK),
)  # fmt: skip
_NOT_NAMES = re.compile(
    "谢谢|高兴|方便|方法|万一|何时|何人|任何|和|的|了|白天|金额|许多|向我|江|周[一二三四五六日末]|于[本今]"
)

_NUMBER = r"[0-9０-９一二三四五六七八九十百]{1,6}"
_ADDRESS = re.compile(
    rf"(?:[{HAN}]{{2,7}}?(?:省|自治区))?(?:[{HAN}]{{2,7}}?(?:市|州|盟|县))?(?:[{HAN}]{{1,6}}?(?:区|县|镇|乡|旗))?"
    rf"[{HAN}]{{1,7}}?(?:大街|大道|路|街|道|巷|弄|胡同|里)(?:[东西南北中]段)?{_NUMBER}[号弄](?:院|楼)?"
    rf"(?:[{HAN}]{{2,10}}(?:大厦|小区|花园|广场|公寓|中心|大楼|写字楼|苑|园))?"
    rf"(?:{_NUMBER}(?:号楼|单元|栋|幢|座|层|楼|号))*(?:{_NUMBER}[室户])?"
)
# What is before an address and not of it: a verb, a label, a preposition.
_LEAD = re.compile(
    rf".*(?:地址[是为]?|住址[是为]?|单位|家里|住在|住|位于|寄[到往给至]|送[到往达至]|发[到往]|改[为成到]|搬[到至]|应为|进入|前往|到|在|往|至|于|是|为|从|请|去|和|的|由|回)(?=[{HAN}]{{2}})"
)


_ADJACENT = re.compile(
    rf"(?:^|[^{HAN}\w])({_SURNAME}[{HAN}]{{1,2}}?)[，、：（( \t]?(?:地址|住址|电话|手机|邮箱|住)?[：]?[在是]?$"
)
_ADJACENT_REACH = 12


def find_zh_names(text: str, anchors: Sequence[tuple[str, int, int]] = ()) -> Iterator[Place]:
    """Chinese names after a label, before a form of address, or right before a value that is a person's.

    >>> text = "患者：李小明。张女士来电。"
    >>> sorted({text[a:b] for a, b, _ in find_zh_names(text)})
    ['李小明']

    Args:
        text: A document.
        anchors: Type, start and end of what was found in it already.
    """
    for type, start, _ in anchors:
        near = type in ("email", "phone", "address") and _ADJACENT.search(text, max(0, start - _ADJACENT_REACH), start)
        if near and not _NOT_NAMES.search(near[1]):
            yield near.start(1), near.end(1), WEAK
    for pattern, score in _PATTERNS:
        for found in pattern.finditer(text):
            if not _NOT_NAMES.search(found[1]):
                yield found.start(1), found.end(1), score


def find_zh_addresses(text: str) -> Iterator[Place]:
    """Chinese addresses: a street with a number, and what stands before and after it.

    >>> text = "请寄到安宁市幸福路12号3栋4层5室。"
    >>> [text[a:b] for a, b, _ in find_zh_addresses(text)]
    ['安宁市幸福路12号3栋4层5室']
    """
    if "号" not in text and "弄" not in text:
        return
    for found in _ADDRESS.finditer(text):
        lead = _LEAD.match(found[0])
        start = found.start() + (lead.end() if lead else 0)
        if found.end() - start > 4:
            yield start, found.end(), LIKELY
