//! Chat templates that would overflow the stack, run without end, or fill the memory. Each ends in under two seconds,
//! below one gigabyte, with an error that names a limit.

use std::time::{Duration, Instant};

use potstill_datasets::{ChatTemplate, Message, RenderOptions, Role, SpecialTokens};

/// Words of the errors, one of which each refusal contains.
const LIMITS: [&str; 11] = [
    "too many bytes of text",
    "more than 10000000 instructions",
    "are nested more than",
    "recursion",
    "follow one another",
    "in a format is over",
    "has more than 256 macros",
    "and the limit is",
    "cannot use another template",
    "cannot hold a macro",
    "the tag cannot be read",
];

fn render(source: &str) -> Result<String, String> {
    let message = |role, content: &str| Message {
        role,
        content: content.to_owned(),
        reasoning: None,
        tool_calls: Vec::new(),
        tool_call_id: None,
    };
    let messages = [
        message(Role::User, "What is two and two?"),
        message(Role::Assistant, "Four."),
    ];
    let special = SpecialTokens::default();
    let options = RenderOptions {
        add_generation_prompt: false,
        special: &special,
        reasoning: None,
        now: None,
    };
    ChatTemplate::from_source("hostile", source)
        .and_then(|template| template.render(&messages, None, options))
        .map(|rendered| rendered.text)
        .map_err(|error| error.to_string())
}

/// A text or list that doubles 60 times.
fn doubling(start: &str, step: &str) -> String {
    format!(
        "{{% set ns = namespace(s={start}) %}}{{% for i in range(60) %}}{{% set ns.s = {step} %}}{{% endfor %}}{{{{ ns.s|length }}}}"
    )
}

fn hostile() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, source: String| all.push((name.to_owned(), source));
    let deep = 100_000;

    // ---- nesting of expressions ----
    for (open, close) in [
        ("(", ")"),
        ("[", "]"),
        ("{'a':", "}"),
        ("not ", ""),
        ("- ", ""),
    ] {
        let source = format!("{{{{ {}1{} }}}}", open.repeat(deep), close.repeat(deep));
        add(&format!("nested {open}"), source);
        add(
            &format!("open {open}"),
            format!("{{{{ {}", open.repeat(deep)),
        );
    }
    for operator in [
        "~ a",
        "+ a",
        "* a",
        "** a",
        "and a",
        "or a",
        "== a",
        "- 1",
        "in a",
        ".b",
        "[0]",
        "|upper",
        "()",
        "is defined",
    ] {
        let chain = format!(" {operator}").repeat(deep);
        add(
            &format!("chain of {operator}"),
            format!("{{{{ a{chain} }}}}"),
        );
    }
    add(
        "chain of conditions",
        format!("{{{{ {}a }}}}", "a if a else ".repeat(deep)),
    );
    add(
        "nested calls",
        format!("{{{{ {}{} }}}}", "f(".repeat(deep), ")".repeat(deep)),
    );
    add(
        "nested indices",
        format!("{{{{ {}0{} }}}}", "a[".repeat(deep), "]".repeat(deep)),
    );
    add(
        "nested targets",
        format!("{{% for {}a in b %}}", "(".repeat(deep)),
    );
    add(
        "nested filters",
        format!("{{% filter {}x %}}", "upper|".repeat(deep)),
    );

    // ---- nesting of blocks ----
    for (open, close) in [
        ("{% if true %}", "{% endif %}"),
        ("{% for a in [1] %}", "{% endfor %}"),
        ("{% with %}", "{% endwith %}"),
        ("{% filter upper %}", "{% endfilter %}"),
        ("{% set a %}", "{% endset %}"),
        ("{% macro a() %}", "{% endmacro %}"),
        ("{% autoescape true %}", "{% endautoescape %}"),
    ] {
        add(
            &format!("nested {open}"),
            format!("{}{}", open.repeat(20_000), close.repeat(20_000)),
        );
    }
    add(
        "elif",
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(20_000)),
    );
    add(
        "many macros",
        (0..5000)
            .map(|i| format!("{{% macro m{i}() %}}{{% endmacro %}}"))
            .collect(),
    );
    add("long source", "x".repeat(2 << 20));

    // ---- recursion ----
    add(
        "macro recursion",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}".to_owned(),
    );
    add(
        "mutual recursion",
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}"
            .to_owned(),
    );
    add(
        "caller recursion",
        "{% macro m() %}{{ caller() }}{% call m() %}x{% endcall %}{% endmacro %}{% call m() %}y{% endcall %}".to_owned(),
    );
    add(
        "loop recursion",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned(),
    );
    add(
        "block recursion",
        "{% block a %}{{ self.a() }}{% endblock %}".to_owned(),
    );
    add(
        "branching recursion",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(40) }}"
            .to_owned(),
    );
    for tag in [
        "include 'hostile'",
        "import 'hostile' as x",
        "extends 'hostile'",
        "from 'hostile' import x",
    ] {
        add(tag, format!("{{% {tag} %}}"));
    }

    // ---- doubling ----
    for (name, start, step) in [
        ("doubling ~", "'ab'", "ns.s ~ ns.s"),
        ("doubling +", "'ab'", "ns.s + ns.s"),
        ("doubling *", "'ab'", "ns.s * 2"),
        ("doubling 2 *", "'ab'", "2 * ns.s"),
        ("doubling list +", "[1]", "ns.s + ns.s"),
        ("doubling list *", "[1]", "ns.s * 2"),
        ("doubling replace", "'ab'", "ns.s|replace('a', 'aab')"),
        (
            "doubling replace method",
            "'ab'",
            "ns.s.replace('b', 'bbb')",
        ),
        ("doubling join", "'ab'", "[ns.s, ns.s]|join"),
        ("doubling join method", "'ab'", "''.join([ns.s, ns.s])"),
        ("doubling joiner", "'ab'", "ns.s.join([ns.s, ns.s])"),
        ("doubling format", "'ab'", "'%s%s'|format(ns.s, ns.s)"),
        ("doubling format method", "'ab'", "'{0}{0}'.format(ns.s)"),
        ("doubling nested list", "[1]", "[ns.s, ns.s]"),
        ("doubling dict", "{'a': 1}", "{'a': ns.s, 'b': ns.s}"),
        ("doubling dict()", "{'a': 1}", "dict(a=ns.s, b=ns.s)"),
        ("doubling tojson", "'\"'", "ns.s|tojson"),
        ("doubling string of list", "'\"\\''", "[ns.s, ns.s]|string"),
        ("doubling pprint", "'ab'", "[ns.s, ns.s]|pprint"),
        ("doubling escape", "'<'", "ns.s|escape|string ~ '<'  ~ ns.s"),
        ("doubling indent", "'\\nab'", "ns.s|indent(ns.s) ~ ns.s"),
        ("doubling chain", "[1]", "ns.s|chain(ns.s)"),
        (
            "doubling zip",
            "[1]",
            "ns.s|zip(ns.s)|list + ns.s|zip(ns.s)|list",
        ),
        ("doubling batch", "[1]", "ns.s|batch(2, ns.s)"),
    ] {
        add(name, doubling(start, step));
    }
    add("doubling set block", "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}".to_owned());
    add("doubling macro", "{% set ns = namespace(s='ab') %}{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% for i in range(60) %}{% set ns.s = m(ns.s) %}{% endfor %}".to_owned());
    add("doubling filter block", "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{% filter upper %}{{ ns.s }}{{ ns.s }}{% endfilter %}{% endset %}{% set ns.s = x %}{% endfor %}".to_owned());
    add(
        "unrolled doubling",
        format!("{{% set s = 'ab' %}}{}", "{% set s = s ~ s %}".repeat(100)),
    );
    add("quadratic", "{% set ns = namespace(s='') %}{% for i in range(9000) %}{% for j in range(1000) %}{% set ns.s = ns.s ~ 'abcdefgh' %}{% endfor %}{% endfor %}".to_owned());
    add("quadratic list", "{% set ns = namespace(s=[]) %}{% for i in range(900) %}{% for j in range(1000) %}{% set ns.s = ns.s + [i] %}{% endfor %}{% endfor %}".to_owned());
    add("nesting value", "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}".to_owned());
    add("nesting batch", "{% set ns = namespace(s=[1]) %}{% for i in range(100000) %}{% set ns.s = ns.s|batch(1) %}{% endfor %}{{ ns.s }}".to_owned());
    add(
        "namespace in itself",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}".to_owned(),
    );
    add("namespace chain", "{% set ns = namespace() %}{% for i in range(100000) %}{% set n = namespace(a=ns.b) %}{% set ns.b = n %}{% endfor %}".to_owned());
    add("macro chain", "{% set ns = namespace() %}{% for i in range(100000) %}{% set p = ns.m %}{% macro m() %}{{ p }}{% endmacro %}{% set ns.m = m %}{% endfor %}".to_owned());

    // ---- numbers that set a size ----
    for expression in [
        "range(1000000000)|length",
        "range(-9223372036854775807, 9223372036854775807)|list",
        "range(0, 9000000000000000000, 1)|length",
        "'x' * 1000000000",
        "1000000000 * 'x'",
        "[1] * 1000000000",
        "[1, 2]|batch(1000000000)",
        "[1, 2]|batch(1000000000, 'x')",
        "[1, 2]|slice(1000000000)",
        "[1, 2]|slice(9223372036854775807, 'x')",
        "'%999999999s'|format('x')",
        "'%.999999999f'|format(1.5)",
        "'%*d'|format(999999999, 1)",
        "'{:>999999999}'.format('x')",
        "'{:.99999f}'.format(1.5)",
        "'a\\nb'|indent(1000000000)",
        "[[1]]|tojson(indent=1000000000)",
        "('a' * 10000000)|replace('a', 'b' * 1000)",
        "('a' * 10000000).replace('', 'b' * 1000)",
        "(['a'] * 1000000)|join('b' * 10000)",
        "('b' * 10000).join(['a'] * 1000000)",
        "('a' * 4000000)|list|length + ('a' * 4000000)|list|length",
        "('a ' * 40000000).split()|length",
        "('a' * 40000000).split('')|length",
        "('\\n' * 40000000).splitlines()|length",
        "('a' * 100000)|trim('b' * 100000)",
        "('a' * 100000).strip('b' * 100000)",
        "('\\u0001' * 60000000)|tojson|length",
        "strftime_now('%c' * 10000000)|length",
        "('<' * 60000000)|escape|length",
        "raise_exception('x' * 1000000000)",
    ] {
        add(expression, format!("{{{{ {expression} }}}}"));
    }

    // ---- time ----
    for body in [
        "x",
        "{{ 'x' }}",
        "{% set a = 1 %}",
        "{% set a = s[5000000] %}",
        "{% set a = s[-i] %}",
        "{% set a = s[i:] %}",
        "{% set a = 'b' in s %}",
        "{% set a = s == t %}",
        "{% set a = l == k %}",
        "{% set a = 'b' in l %}",
        "{% set a = s is in(l) %}",
        "{% set a = l|sort %}",
        "{% set a = l|unique|list %}",
        "{% set a = l|max %}",
        "{% set a = s.find('b') %}",
        "{% set a = s.count('') %}",
        "{% set a = s.isalpha() %}",
        "{% set a = s is lower %}",
        "{% set a = l|last %}",
        "{% set a = l|map('upper')|list %}",
        "{% set a = l|select('eq', s)|list %}",
        "{% set a = s.startswith(l) %}",
        "{% set a %}long text long text long text long text long text long text long text{% endset %}",
    ] {
        add(
            &format!("loops of {body}"),
            format!(
                "{{% set s = 'a' * 1000000 %}}{{% set t = 'a' * 1000000 %}}{{% set l = ['a'] * 10000 %}}{{% set k = ['a'] * 10000 %}}\
             {{% for i in range(4000) %}}{{% for j in range(4000) %}}{body}{{% endfor %}}{{% endfor %}}"
            ),
        );
    }
    let text = "long text ".repeat(10_000);
    add(
        "text in loops",
        format!(
            "{{% for i in range(4000) %}}{{% for j in range(4000) %}}{text}{{% endfor %}}{{% endfor %}}"
        ),
    );
    add(
        "text in a macro",
        format!(
            "{{% macro m() %}}{text}{{% endmacro %}}{{% set a = [] %}}{{% for i in range(4000) %}}{{% set a = m() %}}{{% endfor %}}"
        ),
    );
    all
}

/// The largest resident size of this process in bytes; 0 where the system does not tell.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .map_or(0, |kilobytes: usize| kilobytes * 1024)
}

#[test]
fn hostile_templates_end_with_an_error_that_names_the_limit() {
    let all = hostile();
    assert!(all.len() >= 100, "{}", all.len());
    let mut wrong = Vec::new();
    for (name, source) in &all {
        let start = Instant::now();
        let rendered = render(source);
        let elapsed = start.elapsed();
        if elapsed > Duration::from_secs(2) {
            wrong.push(format!("{name}: {elapsed:?}"));
        }
        match rendered {
            Ok(text) => wrong.push(format!("{name}: renders {} bytes", text.len())),
            Err(error) if LIMITS.iter().any(|limit| error.contains(limit)) => {
                assert!(
                    error.len() < 20_000,
                    "{name}: a message of {} bytes",
                    error.len()
                );
            }
            Err(error) => {
                let start: String = error.chars().take(300).collect();
                wrong.push(format!("{name}: {start}"));
            }
        }
        if peak_bytes() > 1 << 30 {
            wrong.push(format!("{name}: {} bytes of memory", peak_bytes()));
            break;
        }
    }
    println!(
        "{} templates, {} bytes of memory at most",
        all.len(),
        peak_bytes()
    );
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
