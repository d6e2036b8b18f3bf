//! Puts every mutant of some files into these files, all at once and each behind a number. The environment variable
//! `MUTANT` then says which one is alive. So one build serves for all mutants, and each costs no more than its tests.
//!
//! `mutate SKIP FILE...` rewrites the files, and prints a line for each mutant: number, file, line, function, and what
//! was done. The file SKIP has the numbers of those that do not compile, which are left out.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote};
use std::collections::BTreeSet;
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{
    Attribute, BinOp, Block, Expr, ExprBinary, ExprMethodCall, ImplItemFn, Item, ItemConst, ItemFn, ItemStatic, Lit,
    ReturnType, Signature, Stmt, Type, UnOp, parse_quote,
};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let skip = arguments.next().expect("usage: mutate SKIP FILE...");
    let skip = std::fs::read_to_string(skip).unwrap_or_default();
    let skip = skip.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    let mut mutator = Mutator { next: 1, skip, file: String::new(), function: String::new() };
    for file in arguments {
        let text = std::fs::read_to_string(&file).expect(&file);
        let mut tree = syn::parse_file(&text).expect(&file);
        mutator.file = file;
        mutator.visit_file_mut(&mut tree);
        std::fs::write(&mutator.file, prettyplease::unparse(&tree)).expect(&mutator.file);
    }
}

struct Mutator {
    next: u32,
    skip: BTreeSet<u32>,
    file: String,
    function: String,
}

/// Methods of which each is replaced by the other.
const PAIRS: &[(&str, &str)] = &[
    ("min", "max"),
    ("min_by_key", "max_by_key"),
    ("first", "last"),
    ("pop_first", "pop_last"),
    ("first_key_value", "last_key_value"),
    ("pop_front", "pop_back"),
    ("push_front", "push_back"),
    ("plus", "minus"),
    ("saturating_add", "saturating_sub"),
    ("any", "all"),
    ("is_some_and", "is_none_or"),
    ("is_some", "is_none"),
    ("is_ok", "is_err"),
    ("fetch_add", "fetch_sub"),
    ("take_while", "skip_while"),
];

fn other(method: &str) -> Option<&'static str> {
    PAIRS.iter().find_map(|&(a, b)| if method == a { Some(b) } else if method == b { Some(a) } else { None })
}

/// By what each operator is replaced.
fn others(op: &BinOp) -> &'static [&'static str] {
    match op {
        BinOp::Add(_) => &["-", "*"],
        BinOp::Sub(_) => &["+", "/"],
        BinOp::Mul(_) => &["+", "/"],
        BinOp::Div(_) => &["*", "%"],
        BinOp::Rem(_) => &["/", "+"],
        BinOp::And(_) => &["||"],
        BinOp::Or(_) => &["&&"],
        BinOp::BitXor(_) => &["|", "&"],
        BinOp::BitAnd(_) => &["|", "^"],
        BinOp::BitOr(_) => &["&", "^"],
        BinOp::Eq(_) => &["!="],
        BinOp::Ne(_) => &["=="],
        BinOp::Lt(_) => &["<=", "==", ">"],
        BinOp::Le(_) => &["<", ">"],
        BinOp::Ge(_) => &[">", "<"],
        BinOp::Gt(_) => &[">=", "==", "<"],
        BinOp::AddAssign(_) => &["-=", "*="],
        BinOp::SubAssign(_) => &["+=", "/="],
        BinOp::BitAndAssign(_) => &["|=", "^="],
        BinOp::BitOrAssign(_) => &["&=", "^="],
        _ => &[],
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| a.path().is_ident("test") || a.to_token_stream().to_string().contains("cfg (test)"))
}

impl Mutator {
    /// The condition under which a new mutant is alive. `None`: it is left out.
    fn mutant(&mut self, at: Span, what: &str) -> Option<TokenStream> {
        let number = self.next;
        self.next += 1;
        if self.skip.contains(&number) {
            return None;
        }
        println!("{number}\t{}\t{}\t{}\t{what}", self.file, at.start().line, self.function);
        Some(quote!(crate::mutant::on(#number)))
    }

    /// Replaces the function's value, before its first statement.
    fn replace_body(&mut self, signature: &Signature, block: &mut Block) {
        let values: &[&str] = match &signature.output {
            ReturnType::Default => &["()"],
            ReturnType::Type(_, of) => match &**of {
                Type::Path(path) => match path.path.segments.last().map(|s| s.ident.to_string()).as_deref() {
                    Some("bool") => &["true", "false"],
                    Some("u8" | "u32" | "u64" | "usize") => &["0", "1"],
                    Some("f64") => &["0.0", "1.0"],
                    Some("Option") => &["None"],
                    Some("Duration") => &["std::time::Duration::ZERO", "std::time::Duration::MAX"],
                    Some("Vec") => &["Vec::new()"],
                    Some("Moment") => &["crate::leaf::clock::Moment::BIRTH", "crate::leaf::clock::Moment::NEVER"],
                    Some("String") => &["String::new()"],
                    _ => &[],
                },
                _ => &[],
            },
        };
        for value in values.iter().rev() {
            let Some(on) = self.mutant(signature.ident.span(), &format!("the function returns {value}")) else {
                continue;
            };
            let value: Expr = syn::parse_str(value).expect("an expression");
            block.stmts.insert(0, parse_quote!(if #on { return #value; }));
        }
    }

    fn function(&mut self, signature: &Signature, block: &mut Block) {
        if signature.constness.is_some() || signature.ident == "fmt" || signature.ident == "debug_assert_in_use" {
            return;
        }
        let before = std::mem::replace(&mut self.function, signature.ident.to_string());
        self.visit_block_mut(block);
        self.replace_body(signature, block);
        self.function = before;
    }

    /// Chooses the mutated expression, if the mutant is alive.
    fn choose(&mut self, e: &mut Expr, mutated: &TokenStream, what: &str, at: Span) {
        if let Some(on) = self.mutant(at, what) {
            let original = e.clone();
            *e = parse_quote!((if #on { #mutated } else { #original }));
        }
    }

    /// Whether a condition holds always, or never.
    fn condition(&mut self, condition: &mut Expr, may_be_true: bool) {
        if contains_let(condition) {
            return;
        }
        let at = condition.span();
        let text = brief(condition);
        self.visit_expr_mut(condition);
        if may_be_true {
            if let Some(on) = self.mutant(at, &format!("`{text}` is true")) {
                let original = condition.clone();
                *condition = parse_quote!((#on || #original));
            }
        }
        if let Some(on) = self.mutant(at, &format!("`{text}` is false")) {
            let original = condition.clone();
            *condition = parse_quote!((!#on && #original));
        }
    }
}

fn contains_let(e: &Expr) -> bool {
    match e {
        Expr::Let(_) => true,
        Expr::Binary(binary) => contains_let(&binary.left) || contains_let(&binary.right),
        Expr::Paren(paren) => contains_let(&paren.expr),
        _ => false,
    }
}

fn brief(e: &impl ToTokens) -> String {
    let text = e.to_token_stream().to_string();
    let mut text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for (long, short) in [(" . ", "."), (" (", "("), ("( ", "("), (" )", ")"), (" ,", ","), ("& ", "&"), (" :: ", "::")] {
        text = text.replace(long, short);
    }
    if text.chars().count() > 70 { text.chars().take(70).chain("..".chars()).collect() } else { text }
}

impl VisitMut for Mutator {
    fn visit_item_mut(&mut self, item: &mut Item) {
        let attributes = match item {
            Item::Fn(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => return visit_mut::visit_item_mut(self, item),
        };
        if !is_for_tests(attributes) {
            visit_mut::visit_item_mut(self, item);
        }
    }

    // Constants are no code that could ask which mutant is alive.
    fn visit_item_const_mut(&mut self, _: &mut ItemConst) {}
    fn visit_item_static_mut(&mut self, _: &mut ItemStatic) {}
    fn visit_impl_item_const_mut(&mut self, _: &mut syn::ImplItemConst) {}
    fn visit_type_mut(&mut self, _: &mut Type) {}
    fn visit_pat_mut(&mut self, _: &mut syn::Pat) {}
    fn visit_attribute_mut(&mut self, _: &mut Attribute) {}

    fn visit_item_fn_mut(&mut self, item: &mut ItemFn) {
        self.function(&item.sig, &mut item.block);
    }

    fn visit_impl_item_fn_mut(&mut self, item: &mut ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            self.function(&item.sig, &mut item.block);
        }
    }

    fn visit_block_mut(&mut self, block: &mut Block) {
        for stmt in &mut block.stmts {
            let (dropped, at, text) = match stmt {
                Stmt::Expr(e, Some(_)) => (
                    matches!(e, Expr::MethodCall(_) | Expr::Call(_) | Expr::Assign(_) | Expr::Binary(_)),
                    e.span(),
                    brief(e),
                ),
                _ => (false, Span::call_site(), String::new()),
            };
            self.visit_stmt_mut(stmt);
            if dropped {
                if let Some(on) = self.mutant(at, &format!("without `{text}`")) {
                    let original = stmt.clone();
                    *stmt = parse_quote!(if !#on { #original });
                }
            }
        }
    }

    fn visit_arm_mut(&mut self, arm: &mut syn::Arm) {
        if let Some((_, guard)) = &mut arm.guard {
            self.condition(guard, true);
        }
        self.visit_expr_mut(&mut arm.body);
    }

    /// An arm before the one for all others is left out.
    fn visit_expr_match_mut(&mut self, e: &mut syn::ExprMatch) {
        self.visit_expr_mut(&mut e.expr);
        let for_others = e.arms.iter().any(|arm| matches!(arm.pat, syn::Pat::Wild(_)) && arm.guard.is_none());
        for arm in &mut e.arms {
            self.visit_arm_mut(arm);
            if for_others && !matches!(arm.pat, syn::Pat::Wild(_)) {
                let at = arm.pat.span();
                if let Some(on) = self.mutant(at, &format!("without the arm `{}`", brief(&arm.pat))) {
                    let guard = match arm.guard.take() {
                        Some((_, guard)) => parse_quote!((!#on && #guard)),
                        None => parse_quote!(!#on),
                    };
                    arm.guard = Some((Default::default(), Box::new(guard)));
                }
            }
        }
    }

    fn visit_expr_mut(&mut self, e: &mut Expr) {
        match e {
            Expr::Binary(binary) if contains_let(&binary.left) || contains_let(&binary.right) => {
                visit_mut::visit_expr_mut(self, e);
            }
            Expr::Binary(binary) => {
                let pristine = binary.clone();
                visit_mut::visit_expr_mut(self, e);
                let ExprBinary { left, op, right, .. } = &pristine;
                for other in others(op) {
                    let other: BinOp = syn::parse_str(other).expect("an operator");
                    let what = format!(
                        "`{}` for `{}` in `{}`",
                        other.to_token_stream(),
                        op.to_token_stream(),
                        brief(&pristine)
                    );
                    self.choose(e, &quote!((#left) #other (#right)), &what, op.span());
                }
            }
            Expr::Unary(unary) if matches!(unary.op, UnOp::Not(_)) => {
                let pristine = unary.expr.clone();
                let (at, what) = (unary.span(), format!("without the `!` of `{}`", brief(unary)));
                visit_mut::visit_expr_mut(self, e);
                self.choose(e, &quote!(#pristine), &what, at);
            }
            Expr::MethodCall(call) => {
                let pristine = call.clone();
                visit_mut::visit_expr_mut(self, e);
                let ExprMethodCall { receiver, method, args, .. } = &pristine;
                let text = brief(&pristine);
                if method == "push" && args.len() == 1 {
                    let what = format!("`insert(0, ..)` for `push(..)` in `{text}`");
                    self.choose(e, &quote!((#receiver).insert(0, #args)), &what, method.span());
                } else if let Some(other) = other(&method.to_string()) {
                    let what = format!("`{other}` for `{method}` in `{text}`");
                    let other = syn::Ident::new(other, method.span());
                    self.choose(e, &quote!((#receiver).#other(#args)), &what, method.span());
                }
            }
            Expr::If(branch) => {
                self.condition(&mut branch.cond, true);
                if contains_let(&branch.cond) {
                    self.visit_expr_mut(&mut branch.cond);
                }
                self.visit_block_mut(&mut branch.then_branch);
                if let Some((_, other)) = &mut branch.else_branch {
                    self.visit_expr_mut(other);
                }
            }
            Expr::While(repeated) if !contains_let(&repeated.cond) => {
                self.condition(&mut repeated.cond, false);
                self.visit_block_mut(&mut repeated.body);
            }
            Expr::Lit(literal) => {
                if let Lit::Int(int) = &literal.lit {
                    if let Ok(value) = int.base10_parse::<u64>() {
                        let (at, what) = (int.span(), format!("{} for {value}", value + 1));
                        let text = format!("{}{}", value + 1, int.suffix());
                        let more: Expr = syn::parse_str(&text).expect("a number");
                        self.choose(e, &quote!(#more), &what, at);
                    }
                }
            }
            // What must be known when it is compiled.
            Expr::Repeat(_) | Expr::Const(_) | Expr::Macro(_) => {}
            _ => visit_mut::visit_expr_mut(self, e),
        }
    }
}
